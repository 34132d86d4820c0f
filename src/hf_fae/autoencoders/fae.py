"""FAE, the Feature Auto-Encoder (arXiv 2512.07829): one attention layer between a frozen encoder and the generator.

image -> frozen encoder -> features -> `encoder` -> latents
latents -> `feature_decoder` -> features -> `pixel_decoder` -> image
"""

import math

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F

from ..encoders import VisionEncoder
from ..latents import MIN_LOGVAR, check_finite, normalized_posterior
from ..layers.attention import SelfAttention
from ..layers.blocks import BlockStack, TransformerBlock
from ..layers.norms import RMSNorm
from ..layers.positions import SinCosPositions, rotary_angles, token_grid
from .frozen_encoder import FrozenEncoderMixin
from .pixel_decoder import PixelDecoder


__all__ = ["AutoencoderFAE"]


class SingleAttentionEncoder(nn.Module):
    """One attention layer with a skip map and no MLP: features (B, N, C) -> mean and log-variance (B, N, 2 * latents).

    Consecutive linear maps are merged, so there is no separate output projection (paper, appendix A; wiring from the
    published 38.17 M).
    """

    def __init__(self, feature_dim: int, latent_channels: int, head_dim: int):
        super().__init__()
        inner_dim = 4 * feature_dim
        self.attn = SelfAttention(feature_dim, inner_dim // head_dim, head_dim, project_out=False)
        self.to_skip = nn.Linear(feature_dim, inner_dim)
        self.proj_out = nn.Linear(inner_dim, 2 * latent_channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj_out(F.silu(self.attn(features) + self.to_skip(features)))


class FeatureMoments(nn.Module):
    """No encoder: the features (B, N, C) are the latents, without spread (the log-variance is at its lower clamp)."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([features, torch.full_like(features, MIN_LOGVAR)], dim=-1)


class FeatureDecoder(BlockStack):
    """Latent tokens (B, N, latents) -> features (B, N, C): six layers with rotary positions, RMSNorm and SwiGLU.

    A fixed position table is added as well, and the final norm is the output (paper, section 4.2; published 170.43 M).
    """

    def __init__(self, latent_channels: int, feature_dim: int, num_layers: int, head_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.head_dim = head_dim
        self.proj_in = nn.Linear(latent_channels, feature_dim)
        self.pos_embed = SinCosPositions(feature_dim, grid)
        self.blocks = nn.ModuleList(
            TransformerBlock(feature_dim, feature_dim // head_dim, "rms_norm") for _ in range(num_layers)
        )
        self.norm_out = RMSNorm(feature_dim, eps=1e-6)

    def forward(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        hidden_states = self.proj_in(latents)
        hidden_states = hidden_states + self.pos_embed(grid, latents.device).to(hidden_states.dtype)
        rotary_emb = rotary_angles(self.head_dim, grid, latents.device)
        return self.norm_out(self.run_blocks(hidden_states, rotary_emb))


class AutoencoderFAE(FrozenEncoderMixin, AttentionMixin):
    """The FAE tokenizer. `encode` returns normalised latents (B, latent_channels, H / patch_size, W / patch_size).

    Args:
        feature_dim: width of the frozen encoder, and of the feature decoder.
        latent_channels: channels of the latents (paper: 32; 48 and 64 in ablations).
        sample_size: image side or [height, width] of training, in pixels; other sizes work as well.
        patch_size: image pixels per latent, along each axis.
        encoder_type: `"attention"` (the paper's single layer), `"linear"` or `"identity"` (its ablations, Table 5).
            With the last, the standardised features are the latents, of `feature_dim` channels, and
            `decoder_num_layers` must be 0: generators model the encoder's own features.
        encoder_attention_head_dim: head width of that layer, whose inner width is 4 * feature_dim.
        decoder_num_layers, decoder_attention_head_dim: the feature decoder.
        pixel_hidden_size, pixel_num_layers, pixel_num_attention_heads: the pixel decoder, a ViT.
        pixel_head: `"linear"`, a patch per token (paper), or `"overlap"`, blended windows of twice its size: no seams
            between patches, for small training budgets.
        image_encoder_id, image_encoder_revision, image_encoder_config: Hub id and revision of the frozen encoder, and
            its `VisionEncoder.config`.

    Encoder and decoders work on features standardised per channel with `features_mean` and `features_std` (identity
    until `set_feature_statistics`: the paper's literal reading); public methods accept and return the frozen encoder's
    own, raw features.

    Raises:
        ValueError: an argument out of range, or two that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["TransformerBlock", "SingleAttentionEncoder"]
    _repeated_blocks = ["TransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "image_encoder"]
    _keep_in_fp32_modules = ["latents_mean", "latents_std", "features_mean", "features_std"]

    @register_to_config
    def __init__(
        self,
        feature_dim: int = 1536,
        latent_channels: int = 32,
        sample_size: int | list[int] = 256,
        patch_size: int = 16,
        encoder_type: str = "attention",
        encoder_attention_head_dim: int = 256,
        decoder_num_layers: int = 6,
        decoder_attention_head_dim: int = 64,
        pixel_hidden_size: int = 1024,
        pixel_num_layers: int = 24,
        pixel_num_attention_heads: int = 16,
        pixel_head: str = "linear",
        image_encoder_id: str | None = None,
        image_encoder_revision: str | None = None,
        image_encoder_config: dict | None = None,
    ):
        super().__init__()
        for name, width, divisor in (
            ("encoder_attention_head_dim", 4 * feature_dim, encoder_attention_head_dim),
            ("decoder_attention_head_dim", feature_dim, decoder_attention_head_dim),
            ("pixel_num_attention_heads", pixel_hidden_size, pixel_num_attention_heads),
        ):
            if width % divisor:
                raise ValueError(f"{name} must divide the width {width}, got {divisor}")
        grid = token_grid(sample_size, patch_size)
        if encoder_type == "attention":
            self.encoder = SingleAttentionEncoder(feature_dim, latent_channels, encoder_attention_head_dim)
        elif encoder_type == "linear":
            self.encoder = nn.Linear(feature_dim, 2 * latent_channels)
        elif encoder_type == "identity":
            for name, value, required in (
                ("latent_channels", latent_channels, feature_dim),
                ("decoder_num_layers", decoder_num_layers, 0),
            ):
                if value != required:
                    raise ValueError(f"{name} must be {required} for encoder_type 'identity', got {value}")
            self.encoder = FeatureMoments()
        else:
            raise ValueError(f"encoder_type must be 'attention', 'linear' or 'identity', got {encoder_type!r}")
        self.feature_decoder = None
        if encoder_type != "identity":
            self.feature_decoder = FeatureDecoder(
                latent_channels, feature_dim, decoder_num_layers, decoder_attention_head_dim, grid
            )
        self.pixel_decoder = PixelDecoder(
            feature_dim,
            hidden_size=pixel_hidden_size,
            num_layers=pixel_num_layers,
            num_attention_heads=pixel_num_attention_heads,
            patch_size=patch_size,
            grid=grid,
            head=pixel_head,
        )
        self.image_encoder = None
        self.register_buffer("features_mean", torch.zeros(feature_dim, dtype=torch.float32))
        self.register_buffer("features_std", torch.ones(feature_dim, dtype=torch.float32))
        self.init_latent_statistics(latent_channels, 1, 1, tile=grid)

    @classmethod
    def from_encoder(cls, image_encoder: VisionEncoder, **config) -> "AutoencoderFAE":
        """A fresh FAE sized for `image_encoder`, with it attached; `config` are further arguments of `__init__`.

        An encoder from the Hub is recorded with its id and commit: `load_encoder` then finds the same one again.
        """
        config = {"feature_dim": image_encoder.hidden_size, "image_encoder_config": image_encoder.config, **config}
        if "image_encoder_id" not in config:
            config |= {"image_encoder_id": image_encoder.repo_id, "image_encoder_revision": image_encoder.revision}
        model = cls(**config)
        model.attach_encoder(image_encoder)
        return model

    @property
    def spatial_compression_ratio(self) -> int:
        return self.config.patch_size

    @property
    def feature_shape(self) -> tuple[int, ...]:
        rows, columns = token_grid(self.config.sample_size, self.config.patch_size)
        return (rows * columns, self.config.feature_dim)

    @property
    def is_deterministic(self) -> bool:
        """As `LatentAutoencoderMixin.is_deterministic`: with `encoder_type="identity"`."""
        return self.config.encoder_type == "identity"

    def encoding_parts(self) -> tuple[list[torch.Tensor], object]:
        tensors = [*self.encoder.parameters(), self.features_mean, self.features_std]
        return tensors, self.config.encoder_attention_head_dim

    @torch.no_grad()
    def set_feature_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Set the per-channel mean and standard deviation (C,) of the raw features over the training set.

        Raises:
            ValueError: another shape, or a std that is not positive and finite.
        """
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.features_mean.shape:
                raise ValueError(f"{name} must have shape {tuple(self.features_mean.shape)}, got {tuple(value.shape)}")
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"mean and std must be finite and std positive, got a std of {std.min().item()}")
        self.features_mean = mean.detach().to(self.features_mean.device, torch.float32).clone()
        self.features_std = std.detach().to(self.features_std.device, torch.float32).clone()

    def standardize_features(self, features: torch.Tensor) -> torch.Tensor:
        """Raw features (B, N, C) in the scale of losses and decoder noise: computed in fp32, in the model's dtype."""
        return ((features.float() - self.features_mean.float()) / self.features_std.float()).to(self.dtype)

    @apply_forward_hook
    def encode_features(
        self, features: torch.Tensor, grid: tuple[int, int] | None = None, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple:
        """The posterior of the normalised latents of the frozen encoder's features.

        Args:
            features: raw tokens (B, N, feature_dim) of the frozen encoder.
            grid: height and width with height * width = N; by default a square.

        Raises:
            ValueError: features of another width, or another number of tokens than the grid has cells.
        """
        moments = self._moments(features, self._check_features(features, grid))
        posterior = normalized_posterior(moments, self.latents_mean, self.latents_std)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def encode(self, pixel_values: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """The posterior of the normalised latents of images (B, 3, H, W) in [-1, 1].

        `.latent_dist.sample(generator)` is random, `.latent_dist.mode()` deterministic: both are (B, C, h, w).

        Raises:
            ValueError: no encoder is attached, or the input is no finite images as of `extract_features`.
        """
        self.check_images(pixel_values, multiple_of=self.config.patch_size)
        check_finite("pixel_values", pixel_values)
        moments = self._in_parts(
            lambda images: self._moments(*self.extract_features(images)),
            pixel_values,
            input_unit=self.config.patch_size,
            output_unit=1,
        )
        posterior = normalized_posterior(moments, self.latents_mean, self.latents_std)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, latents: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """Images (B, 3, H, W), about [-1, 1] and unclamped, from normalised latents (B, C, h, w).

        `encode` and `decode` work in slices and tiles where these are enabled; the methods on features do not.

        `generator` is accepted, as by all diffusers autoencoders; decoding is deterministic.

        Raises:
            ValueError: latents of another shape.
        """
        self.check_latents(latents)
        sample = self._in_parts(
            lambda part: self.pixel_decoder(self.decode_standardized(part), tuple(part.shape[2:])),
            latents,
            input_unit=1,
            output_unit=self.config.patch_size,
        )
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decode_features(self, latents: torch.Tensor) -> torch.Tensor:
        """The frozen encoder's features, reconstructed: raw tokens (B, h * w, feature_dim) from normalised latents.

        Raises:
            ValueError: latents of another shape.
        """
        self.check_latents(latents)
        features = self.decode_standardized(latents)
        return (features.float() * self.features_std.float() + self.features_mean.float()).to(features.dtype)

    @apply_forward_hook
    def decode_pixels(
        self, features: torch.Tensor, grid: tuple[int, int] | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple:
        """Images (B, 3, H, W) from raw encoder features (B, N, feature_dim): the pixel decoder alone.

        Raises:
            ValueError: as `encode_features`.
        """
        grid = self._check_features(features, grid)
        sample = self.pixel_decoder(self.standardize_features(features), grid)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        pixel_values: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        """Reconstruct images (B, 3, H, W) in [-1, 1], from the mode of their posterior or from a sample of it."""
        posterior = self.encode(pixel_values).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)

    def _moments(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Mean and log-variance (B, 2C, h, w) of the unnormalised latents."""
        return self.encoder(self.standardize_features(features)).transpose(1, 2).unflatten(2, grid)

    def decode_standardized(self, latents: torch.Tensor) -> torch.Tensor:
        """As `decode_features`, in the standardised scale of losses and of the pixel decoder."""
        tokens = self.denormalize_latents(latents).to(self.dtype).flatten(2).transpose(1, 2)
        return tokens if self.feature_decoder is None else self.feature_decoder(tokens, tuple(latents.shape[2:]))

    def _check_features(self, features: torch.Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        if features.ndim != 3 or features.shape[2] != self.config.feature_dim:
            raise ValueError(
                f"features must have shape (batch, tokens, {self.config.feature_dim}), got {tuple(features.shape)}"
            )
        if grid is None:
            grid = (math.isqrt(features.shape[1]),) * 2
        if min(grid) < 1 or grid[0] * grid[1] != features.shape[1]:
            raise ValueError(f"grid must have {features.shape[1]} cells as features have tokens, got {grid}")
        return grid
