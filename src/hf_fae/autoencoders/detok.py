"""l-DeTok, the latent denoising tokenizer (arXiv 2507.15856): a ViT autoencoder trained on corrupt latents.

image -> patches, some of them dropped -> `encoder` -> posterior -> sample, with noise -> `decoder` -> image

Training drops patches and adds noise to latents, because generators see such latents: autoregressive ones a part of
them, denoisers noisy ones. Inference does neither.
"""

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional as F

from ..latents import MAX_LOGVAR, MIN_LOGVAR
from ..layers.blocks import BlockStack, TransformerBlock, init_vit_weights
from ..layers.norms import RMSNorm
from ..layers.positions import token_grid, unit_rotary_angles
from .pixel_tokenizer import PixelTokenizer, check_heads


__all__ = ["AutoencoderDeTok", "AutoencoderDeTokOutput", "add_latent_noise"]

NOISE_TYPES = ("interpolate", "add")


def add_latent_noise(
    latents: torch.Tensor, noise: torch.Tensor, noise_level: torch.Tensor, gamma: float, noise_type: str
) -> torch.Tensor:
    """(1 - tau) x + tau gamma eps, or x + tau gamma eps with `noise_type="add"` (the paper's weaker ablation).

    Args:
        latents, noise: x and eps, (B, N, C).
        noise_level: tau in [0, 1] of each image, (B,).
        gamma: scale of the noise; 0 returns x.
    """
    if gamma == 0:
        return latents
    tau = noise_level[:, None, None]
    return (latents if noise_type == "add" else (1 - tau) * latents) + tau * gamma * noise


class DeTokStack(BlockStack):
    """Base of both halves: learned and 2-D rotary positions, and RMSNorm before, in and after the blocks."""

    def __init__(self, dim: int, num_layers: int, heads: int, grid: tuple[int, int], rotary_as_released: bool):
        super().__init__()
        self.head_dim, self.grid, self.rotary_as_released = dim // heads, grid, rotary_as_released
        self.positions = nn.Parameter(dim**-0.5 * torch.randn(grid[0] * grid[1], dim))
        self.norm_in = RMSNorm(dim, eps=1e-6)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads, "rms_norm", ff_multiple_of=1) for _ in range(num_layers)
        )
        self.norm_out = RMSNorm(dim, eps=1e-6)

    def run(self, tokens: torch.Tensor, visible_patches: torch.Tensor | None = None) -> torch.Tensor:
        """Run norms and blocks on all tokens (B, N, dim), or on those of visible patches alone (B, K, dim)."""
        rotary_emb = unit_rotary_angles(self.head_dim, self.grid, tokens.device, self.rotary_as_released)
        if visible_patches is not None:  # they keep the angles of their positions
            rotary_emb = tuple(values[visible_patches][:, :, None] for values in rotary_emb)
        return self.norm_out(self.run_blocks(self.norm_in(tokens), rotary_emb))


class DeTokEncoder(DeTokStack):
    """Images (B, 3, H, W) -> mean and log-variance (B, N, 2 * latent_channels) of all patches, or of visible ones."""

    def __init__(self, dim: int, *stack, latent_channels: int, patch_size: int):
        super().__init__(dim, *stack)
        self.proj_in = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.proj_out = nn.Linear(dim, 2 * latent_channels)
        init_vit_weights(self)

    def forward(self, pixel_values: torch.Tensor, visible_patches: torch.Tensor | None = None) -> torch.Tensor:
        tokens = self.proj_in(pixel_values).flatten(2).transpose(1, 2).contiguous()
        tokens = tokens + self.positions.to(tokens.dtype)
        if visible_patches is not None:
            tokens = torch.take_along_dim(tokens, visible_patches[..., None], dim=1)
        return self.proj_out(self.run(tokens, visible_patches))


class DeTokDecoder(DeTokStack):
    """Latent tokens (B, N, latent_channels), or those of visible patches, -> images (B, 3, H, W), unclamped."""

    def __init__(self, dim: int, *stack, latent_channels: int, patch_size: int):
        super().__init__(dim, *stack)
        self.patch_size = patch_size
        self.proj_in = nn.Linear(latent_channels, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.proj_out = nn.Linear(dim, 3 * patch_size**2)
        self.conv_out = nn.Conv2d(3, 3, kernel_size=3, padding=1)
        init_vit_weights(self)

    def forward(self, latents: torch.Tensor, visible_patches: torch.Tensor | None = None) -> torch.Tensor:
        tokens = self.proj_in(latents)
        if visible_patches is not None:
            masks = self.mask_token.to(tokens.dtype).expand(len(tokens), len(self.positions), -1)
            tokens = masks.scatter(1, visible_patches[..., None].expand_as(tokens), tokens)
        patches = self.proj_out(self.run(tokens + self.positions.to(tokens.dtype)))
        pixels = F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, self.grid), self.patch_size)
        return self.conv_out(pixels)


@dataclass
class AutoencoderDeTokOutput(BaseOutput):
    """Output of `AutoencoderDeTok.forward`: images (B, 3, H, W), about [-1, 1], and the moments of their latents.

    Attributes:
        moments: mean and log-variance (B, 2 * latent_channels, 1, K) of the *unnormalised* latents of the K visible
            patches, in raster order where all are visible. The paper's KL term is the mean of
            `DiagonalGaussianDistribution(moments).kl()`.
    """

    sample: torch.Tensor
    moments: torch.Tensor | None = None  # never None; Accelerate rebuilds outputs without arguments


class AutoencoderDeTok(PixelTokenizer):
    """The tokenizer of l-DeTok: `encode` returns normalised latents (B, latent_channels, h, w), one for each patch.

    The defaults are the paper's base-base model, 85.86 + 85.85 M. Raw latents are far from unit scale, because they
    must dominate the noise of training: call `set_latent_statistics` before training a generator.

    Args:
        sample_size: image side or [height, width], in pixels. Larger images are encoded and decoded in tiles of that
            size after `enable_tiling()`.
        patch_size: image pixels per latent, along each axis.
        latent_channels: channels of the latents.
        encoder_hidden_size, encoder_num_layers, encoder_num_attention_heads: depth and width of the encoder.
        decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads: of the decoder.
        noise_type: noise of training, `"interpolate"` or `"add"`, see `add_latent_noise`.
        noise_gamma: its scale (paper: 3); 0 for none.
        rotary_as_released: rotary positions as the reference code computes them, which released weights require,
            although they are not rotations; see `unit_rotary_angles`.

    Raises:
        ValueError: sizes that do not divide, an unknown `noise_type`, or a `noise_gamma` that is negative or not
            finite.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    _skip_layerwise_casting_patterns = ["positions", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 256,
        patch_size: int = 16,
        latent_channels: int = 16,
        encoder_hidden_size: int = 768,
        encoder_num_layers: int = 12,
        encoder_num_attention_heads: int = 12,
        decoder_hidden_size: int = 768,
        decoder_num_layers: int = 12,
        decoder_num_attention_heads: int = 12,
        noise_type: str = "interpolate",
        noise_gamma: float = 3.0,
        rotary_as_released: bool = False,
    ):
        super().__init__()
        for half, width, heads in (
            ("encoder", encoder_hidden_size, encoder_num_attention_heads),
            ("decoder", decoder_hidden_size, decoder_num_attention_heads),
        ):
            check_heads(half, width, heads)
        if noise_type not in NOISE_TYPES:
            raise ValueError(f"noise_type must be one of {list(NOISE_TYPES)}, got {noise_type!r}")
        if not 0 <= noise_gamma < math.inf:
            raise ValueError(f"noise_gamma must be finite and not negative, got {noise_gamma}")
        grid = token_grid(sample_size, patch_size)
        sizes = {"latent_channels": latent_channels, "patch_size": patch_size}
        self.encoder = DeTokEncoder(
            encoder_hidden_size, encoder_num_layers, encoder_num_attention_heads, grid, rotary_as_released, **sizes
        )
        self.decoder = DeTokDecoder(
            decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads, grid, rotary_as_released, **sizes
        )
        self.init_latent_statistics(latent_channels, 1, 1, tile=grid)

    def encoding_parts(self) -> tuple[list[torch.Tensor], object]:
        config = self.config
        return list(self.encoder.parameters()), [config.encoder_num_attention_heads, config.rotary_as_released]

    def encode_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values.to(self.dtype)).transpose(1, 2).unflatten(2, self.grid)

    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(latents.flatten(2).transpose(1, 2))

    def forward(
        self,
        pixel_values: torch.Tensor,
        visible_patches: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
        latent_noise: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AutoencoderDeTokOutput | tuple:
        """Reconstruct images from the mode of their posteriors, or from a corrupt sample as in training.

        Args:
            pixel_values: images (B, 3, H, W) in [-1, 1], of `config.sample_size`.
            visible_patches: (B, K) long, distinct indices in raster order of the patches that the encoder sees, in the
                order of `moments`; None for all.
            posterior_noise: (B, latent_channels, h, w), standard normal, to sample the posterior; None for its mode.
            latent_noise: (B, latent_channels, h, w), standard normal, eps of `add_latent_noise`.
            noise_level: (B,) in [0, 1], its tau; None for no noise.
            return_dict: return an `AutoencoderDeTokOutput` instead of a tuple (sample, moments).

        Raises:
            ValueError: images of another size, or another argument of another shape.
        """
        self.check_size(pixel_values)
        self._check_corruption(len(pixel_values), visible_patches, posterior_noise, latent_noise, noise_level)
        moments = self.encoder(pixel_values.to(self.dtype), visible_patches)
        # In fp32, as noise of three times the scale of the latents costs them bits.
        mean, logvar = moments.float().chunk(2, dim=-1)

        def visible(noise):
            noise = noise.flatten(2).transpose(1, 2)
            return noise if visible_patches is None else torch.take_along_dim(noise, visible_patches[..., None], 1)

        latents = mean
        if posterior_noise is not None:
            latents = mean + (0.5 * logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)).exp() * visible(posterior_noise)
        if noise_level is not None:
            config = self.config
            noise = visible(latent_noise)
            latents = add_latent_noise(latents, noise, noise_level, config.noise_gamma, config.noise_type)
        sample = self.decoder(latents.to(self.dtype), visible_patches)
        moments = moments.transpose(1, 2)[:, :, None]
        return AutoencoderDeTokOutput(sample, moments) if return_dict else (sample, moments)

    def _check_corruption(self, batch_size, visible_patches, posterior_noise, latent_noise, noise_level):
        rows, columns = self.grid
        if visible_patches is not None and not (
            visible_patches.ndim == 2
            and visible_patches.dtype == torch.long
            and len(visible_patches) == batch_size
            and 0 < visible_patches.shape[1] <= rows * columns
        ):
            raise ValueError(
                f"visible_patches must be long of shape ({batch_size}, 1 to {rows * columns}), "
                f"got {visible_patches.dtype} of {tuple(visible_patches.shape)}"
            )
        if (latent_noise is None) != (noise_level is None):
            raise ValueError(
                "latent_noise and noise_level must be given together, "
                f"got {type(latent_noise).__name__} and {type(noise_level).__name__}"
            )
        shape = (batch_size, self.config.latent_channels, rows, columns)
        for name, value, wanted in (
            ("posterior_noise", posterior_noise, shape),
            ("latent_noise", latent_noise, shape),
            ("noise_level", noise_level, (batch_size,)),
        ):
            if value is not None and tuple(value.shape) != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
