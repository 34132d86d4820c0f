"""RAEv2's published tokenizers (arXiv 2605.18324, `nyu-visionx/RAEv2-models`): decoders of RAE's layout.

Neither the layers of the encoder nor the decoder's output are in the files: they follow from a tokenizer's name. The
repository states no licence, and the frozen encoder has one of its own.
"""

from pathlib import Path

import torch

from ..autoencoders.raev2 import AutoencoderRAEv2
from ..encoders import VisionEncoder
from .dinov3 import load_dinov3
from .rae import load_tokenizer


__all__ = ["load_raev2"]


def load_raev2(
    weights: str | Path,
    statistics: str | Path | None = None,
    image_encoder: VisionEncoder | str | Path | None = None,
    decoder_num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    **config,
) -> AutoencoderRAEv2:
    """The tokenizer of a published decoder.

    Args:
        weights: `decoder.pt`.
        statistics: `stats.pt` of the latents, which generators work in; None leaves latents as they are.
        image_encoder: DINOv3-L, its Hub id, its folder or Meta's `.pth` file. Without it only decoding works until
            `load_encoder`.
        decoder_num_attention_heads: by default those of the published decoder of this width.
        dtype: of the weights; None keeps that of the file.
        config: further arguments of `AutoencoderRAEv2`: `layers` and `add_spatial_mean`, which are by default those of
            K = 7, and those of a preset.

    Raises:
        ValueError: weights of another family or size, positions that are not the fixed table, or statistics of
            another size.
    """
    if isinstance(image_encoder, (str, Path)) and Path(image_encoder).suffix == ".pth":
        image_encoder = load_dinov3(image_encoder)
    heads = decoder_num_attention_heads
    return load_tokenizer(AutoencoderRAEv2, weights, statistics, image_encoder, config, heads=heads, dtype=dtype)
