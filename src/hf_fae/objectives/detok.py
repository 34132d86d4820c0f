"""l-DeTok's objective (arXiv 2507.15856): a tokenizer that denoises its latents, and then its decoder alone.

    loss = reconstruction + kl_weight * KL

Stage 1 trains everything while a random share of patches is masked and the latents are noisy. Stage 2 trains the
decoder alone, on whole images and clean latents of the frozen encoder.
"""

import math
from typing import Literal

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from ..utils.randomness import ImageRandom
from .base import check_not_negative
from .masking import count_visible
from .reconstruction import Reconstruction, ReconstructionObjective
from .stages import check_stage


__all__ = ["DeTokObjective", "detok_mask_ratio", "select_visible_patches"]


def detok_mask_ratio(uniform: torch.Tensor, max_ratio: float = 0.7) -> torch.Tensor:
    """Mask ratios max(0, U(-0.1, max_ratio)), often 0.

    Args:
        uniform: in [0, 1), any shape.

    Raises:
        ValueError: `max_ratio` is not in [0, 1).
    """
    if not 0 <= max_ratio < 1:
        raise ValueError(f"max_ratio must be in [0, 1), got {max_ratio}")
    return torch.lerp(torch.full_like(uniform, -0.1), torch.full_like(uniform, max_ratio), uniform).clamp_min(0)


def select_visible_patches(scores: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """Indices (B, K) of the ceil(N (1 - mask_ratio)) visible patches of each image, in raster order.

    Args:
        scores: (B, N) uniform numbers; the patches with the lowest scores stay visible.
        mask_ratio: one for all images, as one tensor holds equally many tokens of each.

    Raises:
        ValueError: `mask_ratio` is not in [0, 1).
    """
    return scores.argsort(dim=1)[:, : count_visible(scores.shape[1], mask_ratio)].sort(dim=1).values


class DeTokObjective(ReconstructionObjective):
    """Reconstruction of images from noisy latents of their visible patches, and KL; then the decoder alone.

    In training the latents are samples of the posterior, in both stages. In eval mode they are its modes, without
    masks and noise.

    Args:
        model: an `AutoencoderDeTok`, whose config defines the noise.
        stage: 1, or 2: encoder and mask token stay unchanged, without masks and noise.
        max_mask_ratio: of `detok_mask_ratio`, sampled once per batch of a process.
        kl_weight: of the KL divergence, a sum over the latents of the visible patches and a mean over images.
        losses: as in `ReconstructionObjective`.

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
        check_not_negative(kl_weight=kl_weight)
        super().__init__(model, ["encoder", "decoder"] if stage == 1 else ["decoder"], **losses)
        self.stage, self.max_mask_ratio, self.kl_weight = stage, max_mask_ratio, kl_weight
        if stage == 2:  # nothing is masked
            model.decoder.mask_token.requires_grad_(False)

    @property
    def last_layer_weight(self) -> nn.Parameter:
        return self.model.decoder.conv_out.weight

    @torch.compiler.disable
    def sample_visible_patches(self, count: int, random: ImageRandom) -> torch.Tensor:
        """Indices (B, K) of the visible patches of `count` images; of all patches if none is masked.

        So the mask token has a gradient in every step, if only of 0: other processes may have masked some.
        """
        ratio = detok_mask_ratio(torch.tensor(random.shared_uniform()), self.max_mask_ratio).item()
        return select_visible_patches(random.uniform(count, math.prod(self.model.grid)), ratio)

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        images, model = batch["pixel_values"], self.model
        if not self.training:
            return Reconstruction(model(images).sample)
        shape = (len(images), model.config.latent_channels, *model.grid)
        if self.stage == 2:
            return Reconstruction(model(images, posterior_noise=random.normal(*shape)).sample)
        output = model(
            images,
            self.sample_visible_patches(len(images), random),
            posterior_noise=random.normal(*shape),
            latent_noise=random.normal(*shape),
            noise_level=random.uniform(len(images)),
        )
        kl = DiagonalGaussianDistribution(output.moments.float()).kl().mean()
        return Reconstruction(output.sample, terms={"kl": (self.kl_weight, kl)})
