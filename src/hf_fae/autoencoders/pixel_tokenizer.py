"""The base of tokenizers that encode pixels with a ViT of their own instead of a frozen encoder."""

import torch
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..latents import LatentAutoencoderMixin, check_finite, normalized_posterior
from ..layers.positions import grid_size, token_grid
from ..modeling import StrictModelMixin


__all__ = ["PixelTokenizer", "check_heads"]


class PixelTokenizer(LatentAutoencoderMixin, StrictModelMixin, AttentionMixin):
    """A tokenizer with an `encoder` and a `decoder`, for images of `config.sample_size`.

    A subclass defines `encode_moments` and `decode_raw`; training calls its `forward`, which can mask patches.
    """

    encoder: nn.Module
    decoder: nn.Module

    @property
    def spatial_compression_ratio(self) -> int:
        return self.config.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of an image of `config.sample_size`."""
        return token_grid(self.config.sample_size, self.config.patch_size)

    def encode_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Mean and log-variance (B, 2C, h, w) of the unnormalised latents of images (B, 3, H, W)."""
        raise NotImplementedError

    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) of unnormalised latents (B, C, h, w)."""
        raise NotImplementedError

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """As `LatentAutoencoderMixin.latent_size`, for sizes that `encode` accepts.

        Raises:
            ValueError: another size.
        """
        self._check_sides("height and width must be", (height, width), grid_size(self.config.sample_size), True)
        return super().latent_size(height, width)

    def check_size(self, pixel_values: torch.Tensor, in_tiles: bool = False) -> None:
        """Refuse images for which the encoder has no positions.

        Args:
            in_tiles: accept larger images where tiling is enabled.

        Raises:
            ValueError: not floating point (B, 3, H, W), or of another size than `config.sample_size`.
        """
        self.check_images(pixel_values, multiple_of=self.config.patch_size)
        size = tuple(pixel_values.shape[2:])
        self._check_sides("pixel_values must have images of", size, grid_size(self.config.sample_size), in_tiles)

    def posterior(self, pixel_values: torch.Tensor) -> DiagonalGaussianDistribution:
        self.check_size(pixel_values, in_tiles=True)
        moments = self._in_parts(self.encode_moments, pixel_values, input_unit=self.config.patch_size, output_unit=1)
        return normalized_posterior(moments, self.latents_mean, self.latents_std)

    @apply_forward_hook
    def encode(self, pixel_values: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """The posterior of the normalised latents of images (B, 3, H, W) in [-1, 1].

        `.latent_dist.sample(generator)` samples it, `.latent_dist.mode()` is deterministic: both (B, C, h, w).

        Raises:
            ValueError: values that are not finite, or images of another size (see `check_size`).
        """
        check_finite("pixel_values", pixel_values)
        posterior = self.posterior(pixel_values)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, latents: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """Images (B, 3, H, W), about [-1, 1] and unclamped, of normalised latents (B, C, h, w).

        `generator` is accepted as by all diffusers autoencoders, and unused: decoding is deterministic.

        Raises:
            ValueError: latents of another shape than those of images of `config.sample_size` (or, where tiling is
                enabled, of larger ones).
        """
        self.check_latents(latents)
        sample = self._in_parts(
            lambda part: self.decode_raw(self.denormalize_latents(part).to(self.dtype)),
            latents,
            input_unit=1,
            output_unit=self.config.patch_size,
        )
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def check_latents(self, latents: torch.Tensor) -> None:
        """As `LatentAutoencoderMixin.check_latents`, for sizes that `encode` returns.

        Raises:
            ValueError: another shape.
        """
        super().check_latents(latents)
        wanted = self.latent_size(*grid_size(self.config.sample_size))
        self._check_sides("latents must have sides", tuple(latents.shape[2:]), wanted, in_tiles=True)


def check_heads(part: str, width: int, heads: int) -> None:
    """Refuse heads that do not suit 2-D rotary positions, which rotate pairs of channels along two axes.

    Raises:
        ValueError: no heads, or a head width that is not a multiple of 4.
    """
    if heads < 1 or width % (4 * heads):
        raise ValueError(f"{part}_num_attention_heads must split the width {width} into multiples of 4, got {heads}")
