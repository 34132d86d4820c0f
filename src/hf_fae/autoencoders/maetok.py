"""MAETok (arXiv 2502.03444): a 1-D autoencoder, trained as a masked autoencoder.

image -> patches, some replaced by a mask token, and learned latent tokens -> `encoder` -> latent tokens
latent tokens, and a mask token at every patch position -> `decoder` -> image

In training, shallow auxiliary decoders predict other features of the masked patches from the same latents: HOG,
DINOv2, SigLIP.
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional as F

from ..latents import MIN_LOGVAR
from ..layers.positions import grid_size, token_grid
from .maetok_networks import MAETokDecoder, MAETokEncoder
from .pixel_tokenizer import PixelTokenizer, check_heads


__all__ = ["CAPTION", "AutoencoderMAETok", "AutoencoderMAETokOutput"]

ROPE_TYPES = ("axial", "learned")
DECODER_TYPES = ("plain", "modulated")
CAPTION = "caption"  # name of the auxiliary decoder that predicts captions


@dataclass
class AutoencoderMAETokOutput(BaseOutput):
    """Output of `AutoencoderMAETok.forward`: images (B, 3, H, W), about [-1, 1], and auxiliary predictions.

    Attributes:
        predictions: with `predict_targets`, what each auxiliary decoder predicts, by name: (B, N, channels) for the
            patches; logits (B, caption_length, caption_vocab_size) for `"caption"`.
    """

    sample: torch.Tensor
    predictions: dict[str, torch.Tensor] | None = None


class AutoencoderMAETok(PixelTokenizer):
    """The tokenizer of MAETok: `encode` returns normalised latents (B, latent_channels, 1, num_latent_tokens).

    Latents are deterministic: `.latent_dist.sample()` is their mode. Their number does not depend on the image size.
    The defaults are the paper's model for 256 px without its auxiliary decoders, ViT-B in both halves; the preset
    `maetok-b-128` is the released one.

    Args:
        sample_size: image side or [height, width], in pixels.
        patch_size: image pixels per patch, along each axis.
        num_latent_tokens, latent_channels: number and channels of the latents.
        encoder_hidden_size, encoder_num_layers, encoder_num_attention_heads: depth and width of the encoder.
        decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads: of the decoder.
        decoder_type: `"plain"` (the paper), or `"modulated"`: the blocks of the released weights.
        decoder_class_token: the decoder has a class token, as in some released weights.
        rope_type: rotary positions `"axial"`, or `"learned"` for each layer and head as in the released weights.
        rope_theta: their base; 10 in the released weights.
        auxiliary_targets: names and widths of the targets that auxiliary decoders predict for each patch, such as
            `{"hog": 108, "dinov2": 1024, "siglip": 1152}`. The decoders are saved with the model, but used in training
            alone: see `remove_auxiliary_decoders`.
        auxiliary_hidden_size, auxiliary_num_layers, auxiliary_num_attention_heads: their depth and width.
        caption_vocab_size, caption_length: vocabulary and number of the caption tokens that one more auxiliary
            decoder, `"caption"`, predicts; None for no such decoder.

    Raises:
        ValueError: sizes that do not divide, an unknown `rope_type` or `decoder_type`, a target named `"caption"`, or
            only one of `caption_vocab_size` and `caption_length`.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["TransformerBlock", "ModulatedBlock"]
    _repeated_blocks = ["TransformerBlock", "ModulatedBlock"]
    _skip_layerwise_casting_patterns = ["norm", "rotary"]
    _keep_in_fp32_modules = ["latents_mean", "latents_std", "rotary"]  # rounding changes frequencies

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 128,
        latent_channels: int = 32,
        encoder_hidden_size: int = 768,
        encoder_num_layers: int = 12,
        encoder_num_attention_heads: int = 12,
        decoder_hidden_size: int = 768,
        decoder_num_layers: int = 12,
        decoder_num_attention_heads: int = 12,
        decoder_type: str = "plain",
        decoder_class_token: bool = False,
        rope_type: str = "axial",
        rope_theta: float = 100.0,
        auxiliary_targets: dict[str, int] | None = None,
        auxiliary_hidden_size: int = 192,
        auxiliary_num_layers: int = 3,
        auxiliary_num_attention_heads: int = 3,
        caption_vocab_size: int | None = None,
        caption_length: int | None = None,
    ):
        super().__init__()
        for part, width, heads in (
            ("encoder", encoder_hidden_size, encoder_num_attention_heads),
            ("decoder", decoder_hidden_size, decoder_num_attention_heads),
            ("auxiliary", auxiliary_hidden_size, auxiliary_num_attention_heads),
        ):
            check_heads(part, width, heads)
        for name, value, known in (
            ("decoder_type", decoder_type, DECODER_TYPES),
            ("rope_type", rope_type, ROPE_TYPES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
        targets = dict(auxiliary_targets or {})
        if CAPTION in targets:
            raise ValueError(f"auxiliary_targets must not be named {CAPTION!r}, got {list(targets)}")
        if (caption_vocab_size is None) != (caption_length is None):
            raise ValueError(
                "caption_vocab_size and caption_length must be given together, "
                f"got {caption_vocab_size} and {caption_length}"
            )
        grid = token_grid(sample_size, patch_size)
        rope = {"num_latent_tokens": num_latent_tokens, "rope_type": rope_type, "rope_theta": rope_theta}
        common = {"latent_channels": latent_channels, **rope}
        self.encoder = MAETokEncoder(
            encoder_hidden_size,
            encoder_num_layers,
            encoder_num_attention_heads,
            grid=grid,
            patch_size=patch_size,
            **common,
        )
        self.decoder = MAETokDecoder(
            decoder_hidden_size,
            decoder_num_layers,
            decoder_num_attention_heads,
            grid=grid,
            out_channels=3 * patch_size**2,
            decoder_type=decoder_type,
            class_token=decoder_class_token,
            **common,
        )
        outputs = {name: (grid, channels) for name, channels in targets.items()}
        if caption_vocab_size is not None:
            outputs[CAPTION] = ((1, caption_length), caption_vocab_size)
        self.auxiliary_decoders = nn.ModuleDict()
        for name, (cells, channels) in outputs.items():
            self.auxiliary_decoders[name] = MAETokDecoder(
                auxiliary_hidden_size,
                auxiliary_num_layers,
                auxiliary_num_attention_heads,
                grid=cells,
                out_channels=channels,
                decoder_type=decoder_type,
                **common,
            )
        self.init_latent_statistics(latent_channels, 1, 1, tile=None)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """As `PixelTokenizer.latent_size`: always (1, num_latent_tokens)."""
        super().latent_size(height, width)
        return 1, self.config.num_latent_tokens

    def image_size(self, rows: int, columns: int) -> tuple[int, int]:
        """As `LatentAutoencoderMixin.image_size`: always `config.sample_size`."""
        return grid_size(self.config.sample_size)

    def encoding_parts(self) -> tuple[list[torch.Tensor], object]:
        config = self.config
        settings = [config.encoder_num_attention_heads, config.rope_type, config.rope_theta]
        return list(self.encoder.parameters()), settings

    @property
    def is_deterministic(self) -> bool:
        """As `LatentAutoencoderMixin.is_deterministic`."""
        return True

    def encode_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        latents = self.encoder(pixel_values.to(self.dtype)).transpose(1, 2)[:, :, None]
        return torch.cat([latents, torch.full_like(latents, MIN_LOGVAR)], dim=1)

    def posterior(self, pixel_values: torch.Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(super().posterior(pixel_values).parameters, deterministic=True)

    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        return self._to_image(self.decoder(latents.flatten(2).transpose(1, 2)))

    def remove_auxiliary_decoders(self) -> None:
        """Drop the auxiliary decoders, which only stage 1 of training uses: before stage 2, and before publishing."""
        self.auxiliary_decoders = nn.ModuleDict()
        self.register_to_config(auxiliary_targets=None, caption_vocab_size=None, caption_length=None)

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        predict_targets: bool = False,
        return_dict: bool = True,
    ) -> AutoencoderMAETokOutput | tuple:
        """Reconstruct images, in training from their unmasked patches.

        Args:
            pixel_values: images (B, 3, H, W) in [-1, 1], of `config.sample_size`.
            patch_mask: (B, N) bool, in raster order, True for patches that are masked.
            predict_targets: run the auxiliary decoders as well.
            return_dict: return an `AutoencoderMAETokOutput` instead of a tuple.

        Raises:
            ValueError: images of another size, a mask of another shape, or `predict_targets` without auxiliary
                decoders.
        """
        self.check_size(pixel_values)
        shape = (len(pixel_values), self.grid[0] * self.grid[1])
        if patch_mask is not None and (patch_mask.dtype != torch.bool or tuple(patch_mask.shape) != shape):
            raise ValueError(
                f"patch_mask must be bool of shape {shape}, got {patch_mask.dtype} of {tuple(patch_mask.shape)}"
            )
        if predict_targets and not self.auxiliary_decoders:
            raise ValueError("predict_targets must be False for a model without auxiliary decoders, got True")
        latents = self.encoder(pixel_values.to(self.dtype), patch_mask)
        sample = self._to_image(self.decoder(latents))
        if not predict_targets:
            return AutoencoderMAETokOutput(sample) if return_dict else (sample,)
        predictions = {name: decoder(latents) for name, decoder in self.auxiliary_decoders.items()}
        return AutoencoderMAETokOutput(sample, predictions) if return_dict else (sample, predictions)

    def _to_image(self, patches):
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, self.grid), self.config.patch_size)
