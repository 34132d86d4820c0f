"""The objective of RAE (arXiv 2510.11690), RAEv2 (arXiv 2605.18324) and DRoRAE's phases (arXiv 2605.10780)."""

from typing import Literal

import torch
from torch import nn

from ..utils.randomness import ImageRandom
from .base import check_not_negative
from .reconstruction import Reconstruction, ReconstructionObjective


__all__ = ["DRoRAEObjective", "add_decoder_noise"]


def add_decoder_noise(tokens: torch.Tensor, tau: float, random: ImageRandom) -> torch.Tensor:
    """Tokens (B, N, C) plus the noise of RAE's decoder: sigma eps, sigma = tau u with one uniform u per image.

    This is the distribution in RAE's code, which trained its published decoders; arXiv 2510.11690 has |N(0, tau^2)|
    for sigma.
    """
    sigma = tau * random.uniform(len(tokens)).view(-1, 1, 1)
    return tokens + (sigma * random.normal(*tokens.shape)).to(tokens.dtype)


class DRoRAEObjective(ReconstructionObjective):
    """One phase of DRoRAE: the decoder after a frozen fusion, or the fusion before a frozen decoder.

    Phase 1 is the training of RAE and RAEv2, whose `model` has no fusion; in phase 3 it has a trained one. While
    training, the decoder sees noise on the unnormalised latents; the discriminator learns from reconstructions without
    that noise, as in RAE's code.

    Args:
        model: an `AutoencoderDRoRAE` or `AutoencoderRAEv2` with its frozen encoder attached.
        trained: `"decoder"` (phases 1 and 3) or `"fusion"` (phase 2).
        decoder_noise: tau, see `add_decoder_noise`; 0 for none.
        reconstruction_loss: of RAE's recipe.
        losses: as in `ReconstructionObjective`.

    Raises:
        ValueError: another choice, numbers out of range, or no fusion to train.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Literal["decoder", "fusion"] = "decoder",
        decoder_noise: float = 0.8,
        reconstruction_loss: Literal["l2", "l1"] = "l1",
        **losses,
    ):
        if trained not in ("decoder", "fusion"):
            raise ValueError(f"trained must be 'decoder' or 'fusion', got {trained!r}")
        check_not_negative(decoder_noise=decoder_noise)
        fusion_type, fusion_weight = (model.config.get(name) for name in ("fusion_type", "fusion_weight"))
        if trained == "fusion" and (fusion_type != "experts" or fusion_weight == 0):
            raise ValueError(
                "trained must be 'decoder' for a tokenizer whose latents do not depend on experts, got 'fusion' with "
                f"fusion_type {fusion_type!r} and fusion_weight {fusion_weight}"
            )
        super().__init__(model, [trained], reconstruction_loss=reconstruction_loss, **losses)
        self.trains_fusion, self.decoder_noise = trained == "fusion", decoder_noise
        if self.adversarial is not None and self.adversarial.adaptive:
            # Adaptive weights need the gradient of the last layer; in phase 2 no optimiser updates it.
            self.last_layer_weight.requires_grad_(True)

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.decoder.proj_out.weight

    def before_step(self, step: int) -> None:
        super().before_step(step)
        if self.trains_fusion:
            self.last_layer_weight.grad = None  # no optimiser clears it

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        features, _ = self.model.extract_features(batch["pixel_values"])
        with torch.set_grad_enabled(self.trains_fusion and torch.is_grad_enabled()):
            tokens = self.model.fuse(features)
        if not self.training or self.decoder_noise == 0:
            return Reconstruction(self.model.decode_tokens(tokens))
        decoded = self.model.decode_tokens(add_decoder_noise(tokens, self.decoder_noise, random))
        discriminator_images = None
        if self.adversarial is not None and self.adversarial.trains_discriminator:
            with torch.no_grad():
                discriminator_images = self.model.decode_tokens(tokens)
        return Reconstruction(decoded, discriminator_images)
