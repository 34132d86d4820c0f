"""STARFlow's published flows (apple/ml-starflow): a flat state dict, of texts or of classes, and ours.

`starflow_3B_t2i_256x256.pth` is the text model on SD-VAE's latents of 32 x 32 x 4, the defaults here.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..generators.starflow import STARFlowTransformer2DModel
from ..pipelines.fae_starflow import FAEStarFlowPipeline
from .files import build, read_weights
from .keys import KeyTable
from .transforms import (
    ADD_ONE,
    SPLIT_QKV,
    SWAP_HALVES,
    TRANSPOSE,
    chain,
    each_half,
    pixel_columns,
    pixel_rows,
    squeeze,
)


__all__ = ["load_starflow", "starflow_config", "starflow_table"]

# Computed by ours; the published code reads none of the first two.
DROPPED = ("var", "blocks.{i}.attn_mask", "feat_rope.freqs_{cos,sin}")


def starflow_table(num_blocks: int, in_channels: int, patch_size: int = 1, has_classes: bool = False) -> KeyTable:
    """The keys of a flow of `num_blocks` blocks on latents of `in_channels` channels.

    Tokens are (p1, p2, channel) there and (channel, p1, p2) in ours; the output is [scale, mean] there.

    Args:
        has_classes: the deep block is conditioned on one-hot classes instead of a text.
    """
    rows, columns = pixel_rows(patch_size, in_channels), pixel_columns(patch_size, in_channels)
    layer, ours = "blocks.{i}.attn_blocks.{j}", "blocks.{i}.layers.{j}"
    rules = [
        ("blocks.{i}.sos_embed", "blocks.{i}.start_token", chain(squeeze(0, 1), rows)),
        ("blocks.{i}.proj_in.weight", "blocks.{i}.proj_in.weight", columns),
        ("blocks.{i}.proj_in.bias", "blocks.{i}.proj_in.bias"),
        (f"{layer}.attention.norm.{{weight,bias}}", f"{ours}.norm1.{{weight,bias}}"),
        (
            f"{layer}.attention.qkv.{{weight,bias}}",
            tuple(f"{ours}.attn.to_{name}.{{weight,bias}}" for name in "qkv"),
            SPLIT_QKV,
        ),
        (f"{layer}.attention.proj.{{weight,bias}}", f"{ours}.attn.to_out.0.{{weight,bias}}"),
        (f"{layer}.mlp.norm.{{weight,bias}}", f"{ours}.norm2.{{weight,bias}}"),
        (f"{layer}.mlp.main.0.{{weight,bias}}", f"{ours}.ff.net.0.proj.{{weight,bias}}"),
        (f"{layer}.mlp.main.2.{{weight,bias}}", f"{ours}.ff.net.2.{{weight,bias}}"),
        ("blocks.{i}.final_norm.weight", "blocks.{i}.norm_out.weight", ADD_ONE),
        (
            "blocks.{i}.proj_out.{weight,bias}",
            "blocks.{i}.proj_out.{weight,bias}",
            chain(SWAP_HALVES, each_half(rows)),
        ),
    ]
    condition = f"blocks.{num_blocks - 1}.proj_txt"
    if has_classes:  # columns of a one-hot vector's map are rows of a table
        rules += [
            (f"{condition}.weight", "class_embedding.weight", TRANSPOSE),
            (f"{condition}.bias", "class_embedding.bias"),
        ]
    else:
        rules += [(f"{condition}.{{weight,bias}}", "caption_projection.{weight,bias}")]
    return KeyTable(rules, dropped=DROPPED)


def starflow_config(
    state: Mapping[str, torch.Tensor],
    sample_size: int | list[int] = 32,
    patch_size: int = 1,
    attention_head_dim: int = 64,
    num_classes: int | None = None,
    max_caption_length: int = 128,
    noise_sigma: float = 0.3,
) -> dict:
    """The config of `STARFlowTransformer2DModel` for a published state dict; arguments are what it does not show.

    Raises:
        ValueError: the state dict is not that of a flow.
    """
    layers: dict[int, int] = {}
    for key in state:
        name = key.split(".")
        if name[0] == "blocks" and name[2] == "attn_blocks":
            layers[int(name[1])] = max(layers.get(int(name[1]), 0), 1 + int(name[3]))
    condition = f"blocks.{len(layers) - 1}.proj_txt.weight"
    if "blocks.0.proj_in.weight" not in state or condition not in state:
        raise ValueError(f"checkpoint must be a conditional STARFlow, got keys such as {sorted(state)[:3]}")
    width, token_dim = state["blocks.0.proj_in.weight"].shape
    return {
        "sample_size": sample_size,
        "patch_size": patch_size,
        "in_channels": token_dim // patch_size**2,
        "num_layers": [layers[index] for index in range(len(layers))],
        "num_attention_heads": width // attention_head_dim,
        "attention_head_dim": attention_head_dim,
        "num_classes": num_classes,
        "caption_channels": state[condition].shape[1] if num_classes is None else None,
        "max_caption_length": max_caption_length,
        "noise_sigma": noise_sigma,
    }


def load_starflow(
    weights: str | Path,
    vae: AutoencoderKL,
    guidance_scale: float = 4.6,
    text_encoder_id: str = "google/flan-t5-xl",
    dtype: torch.dtype | None = None,
    **config,
) -> FAEStarFlowPipeline:
    """The pipeline of a published flow, such as `starflow_3B_t2i_256x256.pth`.

    A text encoder is not loaded: see `FAEStarFlowPipeline.load_text_encoder`.

    Args:
        weights: file of the flow.
        vae: tokenizer of its latents; for the text model `stabilityai/sd-vae-ft-ema`.
        guidance_scale: 1 + w of the paper; 4.6 is that of the released sampling script.
        text_encoder_id: Hub id or folder that `load_text_encoder` loads; unused by a flow of classes.
        dtype: of the flow; None keeps that of the file.
        config: further arguments of `starflow_config`.

    Raises:
        ValueError: weights of another family or size.
    """
    state = read_weights(weights)
    config = starflow_config(state, **config)
    has_classes = config["num_classes"] is not None
    table = starflow_table(len(config["num_layers"]), config["in_channels"], config["patch_size"], has_classes)
    transformer = build(STARFlowTransformer2DModel, config, table.to_ours(state), dtype)
    return FAEStarFlowPipeline(
        vae,
        transformer,
        text_encoder=None,
        tokenizer=None,
        guidance_scale=guidance_scale,
        text_encoder_id=None if has_classes else text_encoder_id,
    )
