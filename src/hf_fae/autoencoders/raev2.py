"""RAEv2 (arXiv 2605.18324): latents are the mean of several layers of a frozen encoder.

z = mean over the layers of LN(h_l) + mean over the tokens of LN(h_last)

LN has neither gain nor bias, and no norm follows. Few layers are easier to generate, many reconstruct better.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch.nn import functional as F

from .representation import RepresentationAutoencoder


__all__ = ["AutoencoderRAEv2"]


class AutoencoderRAEv2(RepresentationAutoencoder):
    """The tokenizer of RAEv2: `encode` returns normalised latents (B, feature_dim, h, w).

    The latents have no spread: `.latent_dist.sample()` is their mode. Their statistics are per element, (C, h, w), so
    images must be of `sample_size`. The published tokenizers of DINOv3-L: `layers=[11, 13, 15, 17, 19, 21, 23]`
    ("K = 7", for generation), `list(range(1, 24))` ("K = 23", for reconstruction), and "K = 1", which is `[23]`
    with `add_spatial_mean=False`.

    Args:
        feature_dim: width of the frozen encoder.
        latent_channels: channels of the latents, the same number.
        sample_size: image side or [height, width], in pixels.
        patch_size: image pixels per latent, along each axis; the encoder reads one of its own patches for each.
        layers: blocks of the encoder whose outputs are used, counted from 0, in rising order.
        layer_reduction: `"mean"` of the normalised layers, or `"sum"`.
        add_spatial_mean: add the mean over all tokens of the last one of `layers` to every token.
        decoder_output: `"pixels"` in [0, 1], or `"normalized"` by the encoder's image mean and std, as in RAE.
        decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads, decoder_intermediate_size: the decoder,
            by default RAE's ViT-XL.
        image_encoder_id, image_encoder_revision, image_encoder_config: Hub id and revision of the frozen encoder, and
            its `VisionEncoder.config`.

    Raises:
        ValueError: an argument out of range, or two that do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        feature_dim: int = 1024,
        latent_channels: int = 1024,
        sample_size: int | list[int] = 256,
        patch_size: int = 16,
        layers: list[int] | tuple[int, ...] = (11, 13, 15, 17, 19, 21, 23),
        layer_reduction: str = "mean",
        add_spatial_mean: bool = True,
        decoder_output: str = "pixels",
        decoder_hidden_size: int = 1152,
        decoder_num_layers: int = 28,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 4096,
        image_encoder_id: str | None = None,
        image_encoder_revision: str | None = None,
        image_encoder_config: dict | None = None,
    ):
        super().__init__()
        if not layers or layers[0] < 0 or any(low >= high for low, high in zip(layers, layers[1:])):
            raise ValueError(f"layers must be rising numbers of blocks from 0, got {list(layers)}")
        if layer_reduction not in ("mean", "sum"):
            raise ValueError(f"layer_reduction must be 'mean' or 'sum', got {layer_reduction!r}")
        if decoder_output not in ("pixels", "normalized"):
            raise ValueError(f"decoder_output must be 'pixels' or 'normalized', got {decoder_output!r}")
        self.init_decoder()

    @property
    def feature_shape(self) -> tuple[int, ...]:
        rows, columns = self.decoder.grid
        return (rows * columns, self.config.feature_dim)

    def encoding_parts(self) -> tuple[list[torch.Tensor], object]:
        config = self.config
        return [], [list(config.layers), config.layer_reduction, config.add_spatial_mean]

    @apply_forward_hook
    @torch.no_grad()
    def extract_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Unnormalised latents as tokens (B, N, C), and their grid, of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: no encoder is attached, it has too few layers, or the input is no images of `sample_size`.
        """
        self.check_sample_size(pixel_values)
        config, encoder, grid = self.config, self.image_encoder, self.decoder.grid
        if config.layers[-1] >= encoder.num_hidden_layers:
            raise ValueError(
                f"image_encoder must have the layers {list(config.layers)}, "
                f"got one of {encoder.num_hidden_layers} layers"
            )
        size = tuple(side * encoder.patch_size for side in grid)
        if tuple(pixel_values.shape[2:]) != size:
            # As in RAEv2's code, where RAE's is bicubic without antialias, which `VisionEncoder` has built in.
            pixel_values = F.interpolate(pixel_values.float(), size, mode="bilinear", antialias=True)
        states = encoder(pixel_values, grid, output_hidden_states=True).hidden_states
        total = 0
        for layer in config.layers:  # state 0 is the embeddings
            normed = F.layer_norm(states[layer + 1].float(), (encoder.hidden_size,), eps=encoder.layer_norm_eps)
            total = total + normed
        tokens = total / len(config.layers) if config.layer_reduction == "mean" else total
        if config.add_spatial_mean:
            tokens = tokens + normed.mean(dim=1, keepdim=True)
        return tokens.to(encoder.dtype), grid

    def decode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), about [-1, 1], from unnormalised latents (B, N, C): the decoder alone."""
        return (
            self.decoder(tokens) * 2 - 1 if self.config.decoder_output == "pixels" else super().decode_tokens(tokens)
        )
