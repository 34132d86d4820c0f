"""The base of RAE, DRoRAE and RAEv2: a frozen encoder's own features are the latents, and a ViT decodes them.

image -> frozen encoder -> `extract_features` -> `fuse` -> latents
latents -> `decoder` -> image
"""

import torch
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..encoders import VisionEncoder
from ..latents import MIN_LOGVAR, check_finite
from ..layers.positions import grid_size, token_grid
from .frozen_encoder import FrozenEncoderMixin
from .rae_decoder import RAEDecoder


__all__ = ["RepresentationAutoencoder"]


class RepresentationAutoencoder(FrozenEncoderMixin, AttentionMixin):
    """Base of tokenizers whose latents (B, feature_dim, h, w) are features of a frozen encoder.

    The latents have no spread: `.latent_dist.sample()` is their mode. Their statistics are per element, (C, h, w), so
    images must be of `config.sample_size`. A subclass defines `feature_shape` and `extract_features`, and `fuse` where
    the latents are not the features themselves.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["DecoderBlock"]
    _repeated_blocks = ["DecoderBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "image_encoder"]

    def init_decoder(self) -> None:
        """To be called by `__init__`: the decoder of the config, no encoder yet, identity statistics.

        Raises:
            ValueError: channels, heads or a size that do not fit.
        """
        config = self.config
        if config.latent_channels != config.feature_dim:
            raise ValueError(f"latent_channels must be feature_dim {config.feature_dim}, got {config.latent_channels}")
        if config.decoder_hidden_size % config.decoder_num_attention_heads:
            raise ValueError(
                f"decoder_num_attention_heads must divide the width {config.decoder_hidden_size}, "
                f"got {config.decoder_num_attention_heads}"
            )
        grid = token_grid(config.sample_size, config.patch_size)
        self.decoder = RAEDecoder(
            config.feature_dim,
            hidden_size=config.decoder_hidden_size,
            num_layers=config.decoder_num_layers,
            heads=config.decoder_num_attention_heads,
            intermediate_size=config.decoder_intermediate_size,
            patch_size=config.patch_size,
            grid=grid,
        )
        self.image_encoder = None
        self.init_latent_statistics(config.feature_dim, *grid, tile=None)

    @classmethod
    def from_encoder(cls, image_encoder: VisionEncoder, **config) -> "RepresentationAutoencoder":
        """A fresh tokenizer for `image_encoder`, with it attached; `config` are further arguments of `__init__`."""
        width = image_encoder.hidden_size
        config = {
            "feature_dim": width,
            "latent_channels": width,
            "image_encoder_config": image_encoder.config,
            "image_encoder_id": image_encoder.repo_id,
            "image_encoder_revision": image_encoder.revision,
            **config,
        }
        model = cls(**config)
        model.attach_encoder(image_encoder)
        return model

    @property
    def spatial_compression_ratio(self) -> int:
        return self.config.patch_size

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """As `LatentAutoencoderMixin.latent_size`; only images of `sample_size` have statistics."""
        self._check_sides("height and width must be", (height, width), grid_size(self.config.sample_size))
        return self.decoder.grid

    def check_sample_size(self, pixel_values: torch.Tensor) -> None:
        """Refuse what is no images (B, 3, H, W) of `sample_size`, and to encode without an encoder.

        Raises:
            ValueError: no encoder is attached, or another shape.
        """
        self.check_encoder()
        self.check_images(pixel_values, multiple_of=self.config.patch_size)
        size = grid_size(self.config.sample_size)
        if tuple(pixel_values.shape[2:]) != size:
            raise ValueError(
                f"pixel_values must have images of {size[0]} x {size[1]}, for which there are latent statistics, "
                f"got {pixel_values.shape[2]} x {pixel_values.shape[3]}"
            )

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Unnormalised latents as tokens (B, N, C), from the features of `extract_features`; here these themselves."""
        return features

    @apply_forward_hook
    def encode_features(
        self, features: torch.Tensor, grid: tuple[int, int] | None = None, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple:
        """Normalised latents, as a posterior without spread, from features (B, *feature_shape).

        Raises:
            ValueError: features of another shape or grid.
        """
        shape = self.feature_shape
        if tuple(features.shape[1:]) != shape or grid not in (None, self.decoder.grid):
            raise ValueError(
                f"features must have shape (batch, {', '.join(map(str, shape))}) on a grid of {self.decoder.grid}, "
                f"got {tuple(features.shape)} on {grid}"
            )
        latents = self.fuse(features.to(self.dtype)).transpose(1, 2).unflatten(2, self.decoder.grid).float()
        latents = (latents - self.latents_mean.to(latents.device)) / self.latents_std.to(latents.device)
        moments = torch.cat([latents, torch.full_like(latents, MIN_LOGVAR)], dim=1)
        posterior = DiagonalGaussianDistribution(moments.to(features.dtype), deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @property
    def is_deterministic(self) -> bool:
        """As `LatentAutoencoderMixin.is_deterministic`."""
        return True

    @apply_forward_hook
    def encode(self, pixel_values: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Normalised latents, as a posterior without spread, of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: as `extract_features`, or images that are not finite.
        """
        check_finite("pixel_values", pixel_values)
        parts = pixel_values.split(1 if self.use_slicing else len(pixel_values))
        posteriors = [self.encode_features(*self.extract_features(part)).latent_dist for part in parts]
        moments = torch.cat([posterior.parameters for posterior in posteriors])
        posterior = DiagonalGaussianDistribution(moments, deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, latents: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """Images (B, 3, H, W), about [-1, 1] and unclamped, from normalised latents (B, feature_dim, h, w).

        `generator` is accepted, as by all diffusers autoencoders; decoding is deterministic.

        Raises:
            ValueError: latents of another shape.
        """
        parts = latents.split(1 if self.use_slicing else max(len(latents), 1))
        sample = torch.cat([self.decode_tokens(self._tokens(part)) for part in parts])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decode_features(self, latents: torch.Tensor) -> torch.Tensor:
        """Unnormalised latents as tokens (B, h * w, feature_dim), in the scale of the encoder's normalised layers.

        Raises:
            ValueError: latents of another shape.
        """
        return self._tokens(latents)

    def decode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), about [-1, 1], from unnormalised latents (B, N, C): the decoder alone.

        Here its output is in the encoder's image normalisation, as RAE's.
        """
        pixels = self.decoder(tokens)
        statistics = self.config.image_encoder_config or {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        mean, std = (pixels.new_tensor(statistics[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        return (pixels * std + mean) * 2 - 1

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """Reconstruct images (B, 3, H, W) in [-1, 1]."""
        return self.decode(self.encode(pixel_values).latent_dist.mode(), return_dict=return_dict)

    def _tokens(self, latents):
        self.check_latents(latents)
        if tuple(latents.shape[2:]) != self.decoder.grid:
            raise ValueError(f"latents must have sides {self.decoder.grid}, got {tuple(latents.shape[2:])}")
        return self.denormalize_latents(latents).to(self.dtype).flatten(2).transpose(1, 2)
