"""RAE (arXiv 2510.11690) and DRoRAE (arXiv 2605.10780): a frozen encoder's own features as latents.

RAE keeps the last layer unchanged; DRoRAE corrects it slightly by all layers.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..encoders import VisionEncoder
from .diffusers_rae import DiffusersRAEMixin
from .layer_fusion import ACTIVATIONS, LayerFusion, backbone_norm
from .representation import RepresentationAutoencoder


__all__ = ["AutoencoderDRoRAE"]


class AutoencoderDRoRAE(RepresentationAutoencoder, DiffusersRAEMixin):
    """The tokenizer of RAE and DRoRAE: `encode` returns normalised latents (B, feature_dim, h, w).

    The latents have no spread: `.latent_dist.sample()` is their mode. Their statistics are per element, (C, h, w), so
    images must be of `sample_size`. RAEv2 is `AutoencoderRAEv2`.

    Args:
        feature_dim: width of the frozen encoder.
        latent_channels: channels of the latents, the same number.
        sample_size: image side or [height, width], in pixels.
        patch_size: image pixels per latent, along each axis; the encoder reads one of its own patches for each.
        fusion_type: `"experts"` (DRoRAE), `"mean"` of the layers in their place, or `"none"` (RAE).
        fusion_layers: number of fused layers, the deepest ones; 1 for `"none"`.
        fusion_weight: beta of z = LN(z_last + beta (z_fused - z_last)), DRoRAE's 0.2; 0 is RAE.
        expert_hidden_size, expert_activation: of the experts; the activation is `"gelu"`, `"silu"` or `"relu"`.
        decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads, decoder_intermediate_size: the decoder,
            by default RAE's ViT-XL.
        image_encoder_id, image_encoder_revision, image_encoder_config: Hub id and revision of the frozen encoder, and
            its `VisionEncoder.config`.

    Raises:
        ValueError: an argument out of range, or two that do not fit each other.
    """

    _no_split_modules = ["DecoderBlock", "LayerExpert"]

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
        if fusion_type not in ("experts", "mean", "none"):
            raise ValueError(f"fusion_type must be 'experts', 'mean' or 'none', got {fusion_type!r}")
        if fusion_layers < 1 or (fusion_type == "none" and fusion_layers != 1):
            raise ValueError(f"fusion_layers must be positive, and 1 for fusion_type 'none', got {fusion_layers}")
        if expert_activation not in ACTIVATIONS:
            raise ValueError(f"expert_activation must be one of {list(ACTIVATIONS)}, got {expert_activation!r}")
        if not 0 <= fusion_weight <= 1:
            raise ValueError(f"fusion_weight must be from 0 to 1, got {fusion_weight}")
        self.fusion = None
        if fusion_type == "experts":
            self.fusion = LayerFusion(feature_dim, fusion_layers, expert_hidden_size, expert_activation)
        self.init_decoder()

    @classmethod
    def from_encoder(cls, image_encoder: VisionEncoder, **config) -> "AutoencoderDRoRAE":
        """A fresh tokenizer for `image_encoder`, with it attached; `config` are further arguments of `__init__`."""
        fused = config.get("fusion_type") != "none"
        config.setdefault("fusion_layers", image_encoder.num_hidden_layers if fused else 1)
        return super().from_encoder(image_encoder, **config)

    @property
    def feature_shape(self) -> tuple[int, ...]:
        rows, columns = self.decoder.grid
        return (self.config.fusion_layers, rows * columns, self.config.feature_dim)

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
        self.check_sample_size(pixel_values)
        grid, count = self.decoder.grid, self.config.fusion_layers
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
