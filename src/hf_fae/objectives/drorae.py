"""The objectives of RAE (arXiv 2510.11690), RAEv2 (arXiv 2605.18324) and DRoRAE's phases (arXiv 2605.10780)."""

from typing import Literal

import torch
from torch import nn

from ..losses.gan import AdversarialLoss
from ..utils.randomness import ImageRandom
from .base import check_not_negative
from .reconstruction import Reconstruction, ReconstructionObjective


__all__ = ["DRoRAEObjective", "add_decoder_noise"]


def add_decoder_noise(tokens: torch.Tensor, tau: float, random: ImageRandom) -> torch.Tensor:
    """Tokens (B, N, C) with the noise of RAE's decoder: sigma eps, sigma = tau u with one uniform u for each image.

    That is the law of RAE's code, which made its published decoders; arXiv 2510.11690 has |N(0, tau^2)| for sigma.
    """
    sigma = tau * random.uniform(len(tokens)).view(-1, 1, 1)
    return tokens + (sigma * random.normal(*tokens.shape)).to(tokens.dtype)


class DRoRAEObjective(ReconstructionObjective):
    """The phases of DRoRAE (section 3.3): the decoder behind a frozen fusion, or the fusion before a frozen decoder.

    Phase 1 is the training of RAE and RAEv2, whose `model` has no fusion; in phase 3 it has a trained one. While
    training, the decoder sees noise on the unnormalised latents; the discriminator learns from what it makes of them
    without noise, as in RAE's code.

    Args:
        model: an `AutoencoderDRoRAE` or `AutoencoderRAEv2` with its frozen encoder attached.
        trained: `"decoder"` (phases 1 and 3) or `"fusion"` (phase 2).
        decoder_noise: tau, see `add_decoder_noise`; 0 for none.
        reconstruction_loss, perceptual, perceptual_weight, adversarial, discriminator_learning_rate: as
            `ReconstructionObjective`.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Literal["decoder", "fusion"] = "decoder",
        decoder_noise: float = 0.8,
        reconstruction_loss: Literal["l2", "l1"] = "l1",
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        adversarial: AdversarialLoss | None = None,
        discriminator_learning_rate: float | None = None,
    ):
        if trained not in ("decoder", "fusion"):
            raise ValueError(f"trained must be 'decoder' or 'fusion', got {trained!r}")
        check_not_negative(decoder_noise=decoder_noise)
        has_experts = model.config.get("fusion_type") == "experts" and model.config.fusion_weight > 0
        if trained == "fusion" and not has_experts:
            got = {name: model.config.get(name) for name in ("fusion_type", "fusion_weight")}
            raise ValueError(
                "trained must be 'decoder' for a tokenizer whose latents no experts take part in, got 'fusion' with "
                f"fusion_type {got['fusion_type']!r} and fusion_weight {got['fusion_weight']}"
            )
        super().__init__(
            model,
            [trained],
            reconstruction_loss,
            perceptual,
            perceptual_weight,
            adversarial,
            discriminator_learning_rate,
        )
        self.trains_fusion, self.decoder_noise = trained == "fusion", decoder_noise
        if adversarial is not None and adversarial.adaptive:
            # Adaptive weights are taken from its gradient. In phase 2 no optimiser has it, so that it stays as it is.
            self.last_layer_weight.requires_grad_(True)

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.decoder.proj_out.weight

    def before_step(self, step: int) -> None:
        super().before_step(step)
        if self.trains_fusion:
            self.last_layer_weight.grad = None  # which no optimiser clears

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        features, _ = self.model.extract_features(batch["pixel_values"])
        with torch.set_grad_enabled(self.trains_fusion and torch.is_grad_enabled()):
            tokens = self.model.fuse(features)
        if not self.training or self.decoder_noise == 0:
            return Reconstruction(self.model.decode_tokens(tokens))
        decoded = self.model.decode_tokens(add_decoder_noise(tokens, self.decoder_noise, random))
        shown = None
        if self.adversarial is not None and self.adversarial.discriminator_learns:
            with torch.no_grad():
                shown = self.model.decode_tokens(tokens)
        return Reconstruction(decoded, shown)
