"""RAE's published decoders and latent statistics (bytetriper/RAE, `nyu-visionx/RAE-collections`), and ours.

`model.pt` is the decoder's state dict, or a training checkpoint with everything; `stat.pt` holds the mean and variance
of each element of the latents. The frozen encoder is that of its own repository.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ..autoencoders.drorae import AutoencoderDRoRAE
from ..autoencoders.representation import RepresentationAutoencoder
from ..encoders import VisionEncoder
from ..layers.positions import sincos_table
from .files import build, read_weights
from .keys import KeyTable
from .transforms import Transform


__all__ = ["decoder_config", "export_rae", "load_rae", "load_tokenizer", "rae_config", "rae_table"]

VARIANCE_EPS = 1e-5  # added to variances wherever a standard deviation is made of them
HEADS = {768: 12, 1024: 16, 1152: 16}  # of the published decoders ViT-B, ViT-L and ViT-XL, by their widths


def _variance(std: torch.Tensor) -> torch.Tensor:
    return (std.double().square() - VARIANCE_EPS).to(std.dtype)


# In fp64, so that a round trip changes no more than the last bit.
STANDARD_DEVIATION = Transform(lambda var: (var.double() + VARIANCE_EPS).sqrt().to(var.dtype), _variance)


def rae_table() -> KeyTable:
    """The keys of a decoder (`model.pt`) and of its statistics (`stat.pt`) in one state dict."""
    layer, ours = "decoder_layers.{i}", "decoder.blocks.{i}"
    return KeyTable(
        [
            ("decoder_embed.{weight,bias}", "decoder.proj_in.{weight,bias}"),
            ("trainable_cls_token", "decoder.class_token"),
            (
                f"{layer}.attention.attention.query.{{weight,bias}}",
                f"{ours}.attn.to_q.{{weight,bias}}",
            ),
            (f"{layer}.attention.attention.key.{{weight,bias}}", f"{ours}.attn.to_k.{{weight,bias}}"),
            (f"{layer}.attention.attention.value.{{weight,bias}}", f"{ours}.attn.to_v.{{weight,bias}}"),
            (f"{layer}.attention.output.dense.{{weight,bias}}", f"{ours}.attn.to_out.0.{{weight,bias}}"),
            (f"{layer}.intermediate.dense.{{weight,bias}}", f"{ours}.ff.net.0.proj.{{weight,bias}}"),
            (f"{layer}.output.dense.{{weight,bias}}", f"{ours}.ff.net.2.{{weight,bias}}"),
            (f"{layer}.layernorm_before.{{weight,bias}}", f"{ours}.norm1.{{weight,bias}}"),
            (f"{layer}.layernorm_after.{{weight,bias}}", f"{ours}.norm2.{{weight,bias}}"),
            ("decoder_norm.{weight,bias}", "decoder.norm_out.{weight,bias}"),
            ("decoder_pred.{weight,bias}", "decoder.proj_out.{weight,bias}"),  # rows are reordered by our class
            ("mean", "latents_mean"),
            ("var", "latents_std", STANDARD_DEVIATION),
        ],
        dropped=("decoder_pos_embed",),
    )


def rae_config(state: Mapping[str, torch.Tensor], decoder_num_attention_heads: int | None = None) -> dict:
    """Arguments of `AutoencoderDRoRAE` for a published decoder; arguments and errors as of `decoder_config`."""
    return {**decoder_config(state, decoder_num_attention_heads), "fusion_type": "none", "fusion_layers": 1}


def decoder_config(state: Mapping[str, torch.Tensor], decoder_num_attention_heads: int | None = None) -> dict:
    """Arguments of a `RepresentationAutoencoder` for a published decoder: all that its state dict shows.

    Args:
        state: of the decoder alone.
        decoder_num_attention_heads: by default those of the published decoder of this width.

    Raises:
        ValueError: the state dict is not that of a decoder of square images, its positions are not the fixed table,
            or its heads are unknown.
    """
    if "decoder_embed.weight" not in state or "decoder_pos_embed" not in state:
        raise ValueError(f"checkpoint must be a decoder of RAE, got keys such as {sorted(state)[:3]}")
    width, feature_dim = state["decoder_embed.weight"].shape
    heads = HEADS.get(width) if decoder_num_attention_heads is None else decoder_num_attention_heads
    if heads is None:
        raise ValueError(f"decoder_num_attention_heads must be given for a decoder of width {width}, got None")
    side = _check_positions(state["decoder_pos_embed"])
    patch_size = math.isqrt(len(state["decoder_pred.bias"]) // 3)
    return {
        "feature_dim": feature_dim,
        "latent_channels": feature_dim,
        "sample_size": side * patch_size,
        "patch_size": patch_size,
        "decoder_hidden_size": width,
        "decoder_num_layers": sum(key.endswith(".layernorm_before.bias") for key in state),
        "decoder_num_attention_heads": heads,
        "decoder_intermediate_size": len(state["decoder_layers.0.intermediate.dense.bias"]),
    }


def _positions(width: int, side: int) -> torch.Tensor:
    """The fixed table (1, 1 + side^2, width); the class token has no position."""
    return torch.cat([torch.zeros(1, 1, width), sincos_table(width, (side, side))], dim=1)


def _check_positions(table: torch.Tensor) -> int:
    """Refuse other positions than the fixed ones, which our class computes. Returns the side of the grid."""
    side = math.isqrt(table.shape[1] - 1)
    if side**2 != table.shape[1] - 1:
        raise ValueError(f"decoder_pos_embed must be that of a square grid, got {table.shape[1] - 1} patches")
    if not table.is_meta:
        expected = _positions(table.shape[2], side).to(table.dtype)
        difference = (table - expected).abs().max().item()
        if difference > 1e-6:
            raise ValueError(f"decoder_pos_embed must be the fixed sin-cos table, got one {difference:.1e} off")
    return side


def load_rae(
    weights: str | Path,
    statistics: str | Path | None = None,
    image_encoder: VisionEncoder | str | Path | None = None,
    decoder_num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    **config,
) -> AutoencoderDRoRAE:
    """The tokenizer of a published decoder.

    Args:
        weights: `model.pt`, the bare decoder or a training checkpoint, whose averaged weights are used.
        statistics: `stat.pt` of the latents, which generators work in; None leaves latents as they are.
        image_encoder: the frozen encoder that the decoder was trained with, its Hub id or its folder. Without it only
            decoding works until `load_encoder`; then `config` should have the `image_encoder_config`, whose mean and
            std images need.
        decoder_num_attention_heads: see `rae_config`.
        dtype: of the weights; None keeps that of the file.
        config: further arguments of `AutoencoderDRoRAE`, such as those of a preset.

    Raises:
        ValueError: weights of another family or size, positions that are not the fixed table, or statistics of
            another size.
    """
    config = {"fusion_type": "none", "fusion_layers": 1, **config}
    heads = decoder_num_attention_heads
    return load_tokenizer(AutoencoderDRoRAE, weights, statistics, image_encoder, config, heads=heads, dtype=dtype)


def load_tokenizer(
    model_class: type[RepresentationAutoencoder],
    weights: str | Path,
    statistics: str | Path | None,
    image_encoder: VisionEncoder | str | Path | None,
    config: dict,
    *,
    heads: int | None,
    dtype: torch.dtype | None,
) -> RepresentationAutoencoder:
    """A tokenizer of RAE's kind from its files; `heads` are those of its decoder, all else is as of `load_rae`."""
    state = read_weights(weights)
    if any(key.startswith("decoder.") for key in state):  # a training checkpoint also has the encoder
        state = {key.removeprefix("decoder."): state[key] for key in state if key.startswith("decoder.")}
    found = decoder_config(state, heads)
    shape = (found["feature_dim"], *2 * [found["sample_size"] // found["patch_size"]])
    moments = {} if statistics is None else read_weights(statistics)
    state |= {"mean": torch.zeros(shape), "var": torch.full(shape, 1 - VARIANCE_EPS), **moments}
    if isinstance(image_encoder, (str, Path)):
        image_encoder = VisionEncoder.from_pretrained(image_encoder)
    if image_encoder is not None:
        found["image_encoder_id"] = image_encoder.repo_id
        found["image_encoder_revision"] = image_encoder.revision
        found["image_encoder_config"] = image_encoder.config
    vae = build(model_class, {**found, **config}, rae_table().to_ours(state), dtype)
    if image_encoder is not None:
        vae.attach_encoder(image_encoder)
    return vae


def export_rae(vae: RepresentationAutoencoder) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The contents of `model.pt`, fixed positions included, and of `stat.pt`, which the published code loads.

    A fusion has no counterpart there and is left out, as is a choice of layers (RAEv2).

    Raises:
        ValueError: a tokenizer of images that are not square.
    """
    rows, columns = vae.decoder.grid
    if rows != columns:
        raise ValueError(f"sample_size must be square for RAE's code, got a grid of {rows} x {columns}")
    state = {name: value for name, value in vae.state_dict().items() if name.startswith(("decoder.", "latents_"))}
    published = rae_table().to_published(state)
    statistics = {name: published.pop(name) for name in ("mean", "var")}
    table = _positions(vae.config.decoder_hidden_size, rows).to(vae.decoder.class_token)
    return {**published, "decoder_pos_embed": table}, statistics
