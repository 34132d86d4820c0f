"""What tokenizers minimise that encode pixels themselves: l-DeTok (arXiv 2507.15856) and MAETok (arXiv 2502.03444).

Both learn in two stages. In the first one everything learns while patches are hidden; in the second one the decoder
alone, on the latents of the frozen encoder.
"""

import math
from typing import Literal

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from ..utils.randomness import ImageRandom
from .base import check_stage
from .masking import count_visible
from .reconstruction import Reconstruction, ReconstructionObjective


__all__ = ["DeTokObjective", "detok_mask_ratio", "draw_visible_patches"]


class DeTokObjective(ReconstructionObjective):
    """l-DeTok: images from noisy latents of some of their patches, and KL; then the decoder alone.

    In training the latents are samples of the posterior, in both stages. In eval mode they are its modes, and nothing
    is hidden or noisy.

    Args:
        model: an `AutoencoderDeTok`, whose config has the noise.
        stage: 1, or 2: encoder and mask token stay as they are, nothing is hidden and there is no noise.
        max_mask_ratio: M of `detok_mask_ratio`. One ratio is drawn for each batch of a process.
        kl_weight: of the KL divergence, which is a sum over the latents of the visible patches and a mean over images.
        losses: as `ReconstructionObjective`.

    Raises:
        ValueError: another stage, or numbers out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Literal[1, 2] = 1,
        max_mask_ratio: float = 0.7,
        kl_weight: float = 1e-6,
        **losses,
    ):
        check_stage(stage)
        if not 0 <= max_mask_ratio < 1:
            raise ValueError(f"max_mask_ratio must be in [0, 1), got {max_mask_ratio}")
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"kl_weight must be finite and not negative, got {kl_weight}")
        super().__init__(model, ["encoder", "decoder"] if stage == 1 else ["decoder"], **losses)
        self.stage, self.max_mask_ratio, self.kl_weight = stage, max_mask_ratio, kl_weight
        if stage == 2:  # which has no place for it
            model.decoder.mask_token.requires_grad_(False)

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.decoder.conv_out.weight

    @torch.compiler.disable
    def draw_patches(self, count: int, random: ImageRandom) -> torch.Tensor:
        """Numbers (B, K) of the visible patches of `count` images; all of them, if none is hidden.

        So that the mask token has a gradient in every step, if only of 0: other processes may have hidden some.
        """
        ratio = detok_mask_ratio(torch.tensor(random.shared_uniform()), self.max_mask_ratio).item()
        return draw_visible_patches(random.uniform(count, math.prod(self.model.grid)), ratio)

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        images, model = batch["pixel_values"], self.model
        if not self.training:
            return Reconstruction(model(images).sample)
        shape = (len(images), model.config.latent_channels, *model.grid)
        if self.stage == 2:
            return Reconstruction(model(images, posterior_noise=random.normal(*shape)).sample)
        output = model(
            images,
            self.draw_patches(len(images), random),
            posterior_noise=random.normal(*shape),
            latent_noise=random.normal(*shape),
            noise_level=random.uniform(len(images)),
        )
        kl = DiagonalGaussianDistribution(output.moments.float()).kl().mean()
        return Reconstruction(output.sample, terms={"kl": (self.kl_weight, kl)})


def detok_mask_ratio(uniform: torch.Tensor, max_ratio: float = 0.7) -> torch.Tensor:
    """Shares of masked patches, max(0, U(-0.1, max_ratio)) (l-DeTok, arXiv 2507.15856): often none at all.

    Args:
        uniform: in [0, 1), any shape.

    Raises:
        ValueError: `max_ratio` is not in [0, 1).
    """
    if not 0 <= max_ratio < 1:
        raise ValueError(f"max_ratio must be in [0, 1), got {max_ratio}")
    return torch.lerp(torch.full_like(uniform, -0.1), torch.full_like(uniform, max_ratio), uniform).clamp_min(0)


def draw_visible_patches(scores: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """Numbers (B, K) of the ceil(N (1 - mask_ratio)) patches of each image that stay, in raster order.

    Args:
        scores: (B, N) uniform numbers; those with the lowest ones stay.
        mask_ratio: one for all images, as so many tokens are in one tensor.

    Raises:
        ValueError: `mask_ratio` is not in [0, 1).
    """
    return scores.argsort(dim=1)[:, : count_visible(scores.shape[1], mask_ratio)].sort(dim=1).values
