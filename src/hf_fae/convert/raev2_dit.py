"""RAEv2's denoiser (arXiv 2605.18324): `checkpoint.pt` of nyu-visionx/RAEv2-models, of class labels."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.nn import functional as F

from ..generators.raev2 import RAEv2Transformer2DModel
from ..layers.positions import token_grid
from ..pipelines.fae_dit import FAEDiTPipeline
from ..pipelines.latent_pipeline import Tokenizer
from .denoisers import rotary_tables
from .files import build, read_weights
from .keys import KeyTable
from .layouts import check_family, count_layers, square_side
from .transforms import JOIN_HALVES, pixel_rows


__all__ = ["export_raev2_dit", "load_raev2_dit", "raev2_dit_config", "raev2_dit_table"]

BASE_SIZE = 4096  # elements of latents for which the shift is 1


def raev2_dit_table(config: Mapping) -> KeyTable:
    """The keys for a model of `config`, that of a `RAEv2Transformer2DModel` of classes.

    There the blocks of the head are numbered on from the deep ones.
    """
    depth, output = config["num_layers"], pixel_rows(config["patch_size"], config["in_channels"])
    rules = [
        ("s_embedder.proj.{weight,bias}", "proj_in.{weight,bias}"),
        ("x_embedder.proj.{weight,bias}", "head_proj_in.{weight,bias}"),
        ("s_projector.{weight,bias}", "head_condition.{weight,bias}"),
        ("t_embedder.W", "time_proj.frequencies"),
        ("t_embedder.mlp.0.{weight,bias}", "time_embedding.linear_1.{weight,bias}"),
        ("t_embedder.mlp.2.{weight,bias}", "time_embedding.linear_2.{weight,bias}"),
        ("t_embedder.learnable_tokens", "time_tokens.tokens"),
        ("ctx_embedder.learnable_tokens", "class_tokens.tokens"),
        ("ctx_embedder.embedding_table.weight", "class_embedding.weight"),
    ]
    for theirs, ours in (("final_layer", ""), ("base_final_layer", "base_head.")):
        rules += [
            (f"{theirs}.norm.weight", f"{ours}norm_out.weight"),
            (f"{theirs}.adaln_modulation.1.{{weight,bias}}", f"{ours}modulation_out.{{weight,bias}}"),
            (f"{theirs}.linear.{{weight,bias}}", f"{ours}proj_out.{{weight,bias}}", output),
        ]
    for i in range(depth):
        rules += _block_rules(f"blocks.{i}", f"blocks.{i}")
    for i in range(config["head_num_layers"]):
        rules += _block_rules(f"blocks.{depth + i}", f"head_blocks.{i}")
    return KeyTable(rules, dropped=("{enc,dec}_rope.freqs_{cos,sin}", "repa_projector.*"))


def _block_rules(theirs: str, ours: str) -> list[tuple]:
    gated = tuple(f"{theirs}.mlp.{name}.{{weight,bias}}" for name in ("w2", "w1"))  # silu is of w1
    return [
        (f"{theirs}.norm{{1,2}}.weight", f"{ours}.norm{{1,2}}.weight"),
        (f"{theirs}.attn.{{q,k,v}}.{{weight,bias}}", f"{ours}.attn.to_{{q,k,v}}.{{weight,bias}}"),
        (f"{theirs}.attn.{{q,k}}_norm.weight", f"{ours}.attn.norm_{{q,k}}.weight"),
        (f"{theirs}.attn.proj.{{weight,bias}}", f"{ours}.attn.to_out.0.{{weight,bias}}"),
        (gated, f"{ours}.ff.net.0.proj.{{weight,bias}}", JOIN_HALVES),
        (f"{theirs}.mlp.w3.{{weight,bias}}", f"{ours}.ff.net.2.{{weight,bias}}"),
        (f"{theirs}.adaln_modulation.1.{{weight,bias}}", f"{ours}.modulation.{{weight,bias}}"),
    ]


def raev2_dit_config(state: Mapping[str, torch.Tensor], base_head_layer: int = 8) -> dict:
    """The config of `RAEv2Transformer2DModel` for a published state dict.

    Args:
        base_head_layer: number of blocks before the base head, which weights do not show.

    Raises:
        ValueError: the state dict is not that of RAEv2's denoiser of classes.
    """
    names = (
        "s_embedder.proj.weight",
        "x_embedder.proj.weight",
        "ctx_embedder.embedding_table.weight",
        "t_embedder.learnable_tokens",
        "ctx_embedder.learnable_tokens",
        "dec_rope.freqs_cos",
        "blocks.0.attn.q_norm.weight",
    )
    check_family(state, "RAEv2's denoiser", names)
    patches, head_patches, classes, time_tokens, class_tokens, positions, head = (state[name] for name in names)
    dim, in_channels, patch_size = patches.shape[:3]
    total = count_layers(state, "blocks")
    modulated = sum(f"blocks.{i}.adaln_modulation.1.weight" in state for i in range(total))
    return {
        "sample_size": square_side(len(positions)) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": total - modulated,
        "num_attention_heads": dim // len(head),
        "attention_head_dim": len(head),
        "head_num_layers": modulated,
        "head_num_attention_heads": len(head_patches) // positions.shape[1],
        "head_attention_head_dim": positions.shape[1],
        "num_classes": len(classes) - 1,
        "num_time_tokens": len(time_tokens),
        "num_class_tokens": len(class_tokens),
        "prediction_type": "sample",
        "base_head_layer": base_head_layer if "base_final_layer.norm.weight" in state else None,
    }


def load_raev2_dit(
    weights: str | Path,
    vae: Tokenizer | None,
    internal_guidance_scale: float | list | dict = 1.0,
    guidance_scale: float | list | dict = 1.0,
    num_inference_steps: int = 100,
    shift: float | None = None,
    base_head_layer: int = 8,
    dtype: torch.dtype | None = None,
) -> FAEDiTPipeline:
    """The pipeline of a published denoiser.

    Args:
        weights: file of the denoiser's weights.
        vae: tokenizer of its latents, `AutoencoderRAEv2`.
        internal_guidance_scale: as in `FAEDiTPipeline` (published: 1.78 on [0.1, 1]).
        guidance_scale, num_inference_steps: as in `FAEDiTPipeline`; steps of Euler.
        shift: of the scheduler; by default the published one for latents of this size, sqrt(elements / 4096).
        base_head_layer: as in `raev2_dit_config`.
        dtype: of the denoiser; None keeps that of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: weights of another family or size.
    """
    state = read_weights(weights)
    config = raev2_dit_config(state, base_head_layer)
    transformer = build(RAEv2Transformer2DModel, config, raev2_dit_table(config).to_ours(state), dtype)
    if shift is None:
        shift = math.sqrt(config["sample_size"] ** 2 * config["in_channels"] / BASE_SIZE)
    return FAEDiTPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        internal_guidance_scale=internal_guidance_scale,
    )


def export_raev2_dit(model: RAEv2Transformer2DModel) -> dict[str, torch.Tensor]:
    """The state dict of a model as RAEv2's code loads it, strictly: with the fixed rotary tables.

    Raises:
        ValueError: its latents are not square, it has no head, it is of texts, or it predicts the velocity.
    """
    config = model.config
    if config.prediction_type != "sample":
        raise ValueError(
            f"model must have prediction_type 'sample' in its published layout, got {config.prediction_type!r}"
        )
    if config.num_classes is None or not config.head_num_layers:
        raise ValueError(
            "model must have classes and a head in its published layout, "
            f"got num_classes {config.num_classes} and head_num_layers {config.head_num_layers}"
        )
    grid = token_grid(config.sample_size, config.patch_size)
    if grid[0] != grid[1]:
        raise ValueError(f"model must have a square sample_size in its published layout, got {config.sample_size}")
    state = raev2_dit_table(config).to_published(model.state_dict())
    behind = (0, 0, 0, config.num_time_tokens + config.num_class_tokens)
    deep = rotary_tables("enc_rope", config.attention_head_dim, grid)
    state |= {name: F.pad(table, behind, value=float(name.endswith("cos"))) for name, table in deep.items()}
    return state | rotary_tables("dec_rope", config.head_attention_head_dim, grid)
