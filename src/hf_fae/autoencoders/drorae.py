"""RAE (arXiv 2510.11690) and DRoRAE (arXiv 2605.10780): a frozen encoder's own features as latents.

image -> frozen encoder -> normalised states of its layers -> `fuse` -> latents
latents -> `decoder` -> image

RAE keeps the last layer unchanged; DRoRAE corrects it slightly by all layers.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..encoders import VisionEncoder
from ..latents import MIN_LOGVAR, check_finite
from ..layers.positions import grid_size, token_grid
from .diffusers_rae import DiffusersRAEMixin
from .frozen_encoder import FrozenEncoderMixin
from .layer_fusion import ACTIVATIONS, LayerFusion, backbone_norm
from .rae_decoder import RAEDecoder


__all__ = ["AutoencoderDRoRAE"]


class AutoencoderDRoRAE(FrozenEncoderMixin, DiffusersRAEMixin, AttentionMixin):
    """The tokenizer of RAE and DRoRAE: `encode` returns normalised latents (B, feature_dim, h, w).

    The latents have no spread: `.latent_dist.sample()` is their mode. Their statistics are per element, (C, h, w), so
    images must be of `sample_size`.

    Args:
        feature_dim: width of the frozen encoder.
        latent_channels: channels of the latents, the same number.
        sample_size: image side or [height, width], in pixels.
        patch_size: image pixels per latent, along each axis; the encoder reads one of its own patches for each.
        fusion_type: `"experts"` (DRoRAE), `"mean"` of the layers (RAEv2, arXiv 2605.18324), or `"none"` (RAE).
        fusion_layers: number of fused layers, the deepest ones; 1 for `"none"`.
        fusion_weight: beta of z = LN(z_last + beta (z_fused - z_last)), DRoRAE's 0.2; 0 is RAE. With `"mean"`, 1 is
            the mean alone.
        expert_hidden_size, expert_activation: of the experts; the activation is `"gelu"`, `"silu"` or `"relu"`.
        decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads, decoder_intermediate_size: the decoder,
            by default RAE's ViT-XL.
        image_encoder_id, image_encoder_revision, image_encoder_config: Hub id and revision of the frozen encoder, and
            its `VisionEncoder.config`.

    Raises:
        ValueError: an argument out of range, or two that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["DecoderBlock", "LayerExpert"]
    _repeated_blocks = ["DecoderBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "image_encoder"]

    @register_to_config
    def __init__(
        self,
        feature_dim: int = 768,
        latent_channels: int = 768,
        sample_size: int | list[int] = 256,
        patch_size: int = 16,
        fusion_type: str = "experts",
        fusion_layers: int = 12,
        fusion_weight: float = 0.2,
        expert_hidden_size: int = 3072,
        expert_activation: str = "gelu",
        decoder_hidden_size: int = 1152,
        decoder_num_layers: int = 28,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 4096,
        image_encoder_id: str | None = None,
        image_encoder_revision: str | None = None,
        image_encoder_config: dict | None = None,
    ):
        super().__init__()
        if latent_channels != feature_dim:
            raise ValueError(f"latent_channels must be feature_dim {feature_dim}, got {latent_channels}")
        if fusion_type not in ("experts", "mean", "none"):
            raise ValueError(f"fusion_type must be 'experts', 'mean' or 'none', got {fusion_type!r}")
        if fusion_layers < 1 or (fusion_type == "none" and fusion_layers != 1):
            raise ValueError(f"fusion_layers must be positive, and 1 for fusion_type 'none', got {fusion_layers}")
        if expert_activation not in ACTIVATIONS:
            raise ValueError(f"expert_activation must be one of {list(ACTIVATIONS)}, got {expert_activation!r}")
        if not 0 <= fusion_weight <= 1:
            raise ValueError(f"fusion_weight must be from 0 to 1, got {fusion_weight}")
        if decoder_hidden_size % decoder_num_attention_heads:
            raise ValueError(
                f"decoder_num_attention_heads must divide the width {decoder_hidden_size}, "
                f"got {decoder_num_attention_heads}"
            )
        grid = token_grid(sample_size, patch_size)
        self.fusion = None
        if fusion_type == "experts":
            self.fusion = LayerFusion(feature_dim, fusion_layers, expert_hidden_size, expert_activation)
        self.decoder = RAEDecoder(
            feature_dim,
            hidden_size=decoder_hidden_size,
            num_layers=decoder_num_layers,
            heads=decoder_num_attention_heads,
            intermediate_size=decoder_intermediate_size,
            patch_size=patch_size,
            grid=grid,
        )
        self.image_encoder = None
        self.init_latent_statistics(feature_dim, *grid, tile=None)

    @classmethod
    def from_encoder(cls, image_encoder: VisionEncoder, **config) -> "AutoencoderDRoRAE":
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
        fused = config.get("fusion_type") != "none"
        config.setdefault("fusion_layers", image_encoder.num_hidden_layers if fused else 1)
        model = cls(**config)
        model.attach_encoder(image_encoder)
        return model

    @property
    def spatial_compression_ratio(self) -> int:
        return self.config.patch_size

    @property
    def feature_shape(self) -> tuple[int, ...]:
        rows, columns = self.decoder.grid
        return (self.config.fusion_layers, rows * columns, self.config.feature_dim)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """As `LatentAutoencoderMixin.latent_size`; only images of `sample_size` have statistics."""
        self._check_sides("height and width must be", (height, width), grid_size(self.config.sample_size))
        return self.decoder.grid

    def encoding_parts(self) -> tuple[list[torch.Tensor], object]:
        config = self.config
        parameters = [] if self.fusion is None else list(self.fusion.parameters())
        return parameters, [config.fusion_type, config.fusion_layers, config.fusion_weight, config.expert_activation]

    @apply_forward_hook
    @torch.no_grad()
    def extract_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Normalised states of the fused layers for images (B, 3, H, W) in [-1, 1]: (B, L, N, C), the last one last.

        Raises:
            ValueError: no encoder is attached, it has too few layers, or the input is no images of `sample_size`.
        """
        self.check_encoder()
        self.check_images(pixel_values, multiple_of=self.config.patch_size)
        size = grid_size(self.config.sample_size)
        if tuple(pixel_values.shape[2:]) != size:
            raise ValueError(
                f"pixel_values must have images of {size[0]} x {size[1]}, for which there are latent statistics, "
                f"got {pixel_values.shape[2]} x {pixel_values.shape[3]}"
            )
        grid = self.decoder.grid
        count = self.config.fusion_layers
        if count > self.image_encoder.num_hidden_layers:
            raise ValueError(
                f"image_encoder must have fusion_layers {count}, got {self.image_encoder.num_hidden_layers} layers"
            )
        outputs = self.image_encoder(pixel_values, grid, output_hidden_states=count > 1, final_norm="plain")
        last = outputs.last_hidden_state
        earlier = outputs.hidden_states[-count:-1] if count > 1 else ()
        return torch.stack([*(backbone_norm(state) for state in earlier), last], dim=1), grid

    def last_features(self, features: torch.Tensor) -> torch.Tensor:
        """The last layer (B, N, C) of the features (B, L, N, C): what `decode_features` approximates."""
        return features[:, -1]

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Unnormalised latents as tokens (B, N, C), from the layers' states (B, L, N, C) of `extract_features`."""
        last = features[:, -1]
        if self.config.fusion_type == "none" or self.config.fusion_weight == 0:
            return last
        fused = self.fusion(features) if self.fusion is not None else backbone_norm(features.mean(1))
        # Under autocast the experts compute in half precision.
        return backbone_norm(torch.lerp(last, fused.to(last.dtype), self.config.fusion_weight))

    @apply_forward_hook
    def encode_features(
        self, features: torch.Tensor, grid: tuple[int, int] | None = None, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple:
        """Normalised latents, as a posterior without spread, from the layers' states (B, L, N, C).

        Raises:
            ValueError: states of other layers, width or grid.
        """
        shape = self.feature_shape
        if features.ndim != 4 or tuple(features.shape[1:]) != shape or grid not in (None, self.decoder.grid):
            raise ValueError(
                f"features must have shape (batch, {', '.join(map(str, shape))}) on a grid of {self.decoder.grid}, "
                f"got {tuple(features.shape)} on {grid}"
            )
        latents = self.fuse(features.to(self.dtype)).transpose(1, 2).unflatten(2, self.decoder.grid).float()
        latents = (latents - self.latents_mean.to(latents.device)) / self.latents_std.to(latents.device)
        moments = torch.cat([latents, torch.full_like(latents, MIN_LOGVAR)], dim=1)
        posterior = DiagonalGaussianDistribution(moments.to(features.dtype), deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

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
        """Tokens (B, h * w, feature_dim) in the scale of the encoder's normalised last layer.

        Raises:
            ValueError: latents of another shape.
        """
        return self._tokens(latents)

    def decode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), about [-1, 1], from unnormalised latents (B, N, C): the decoder alone."""
        patches = self.decoder(tokens)
        statistics = self.config.image_encoder_config or {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        mean, std = (patches.new_tensor(statistics[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        return (patches * std + mean) * 2 - 1

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
