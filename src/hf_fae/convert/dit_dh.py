"""DiT^DH (RAE, arXiv 2510.11690): `stage2_model.pt` of nyu-visionx/RAE-collections."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..generators.dit_dh import DiTDHTransformer2DModel
from ..pipelines.fae_dit import FAEDiTPipeline
from ..pipelines.latent_pipeline import Tokenizer
from .denoisers import attention_heads, block_rules, end_rules, rotary_tables
from .files import build, read_weights
from .keys import KeyTable
from .layouts import check_family, count_layers, square_side
from .transforms import pixel_rows


__all__ = ["dit_dh_config", "dit_dh_table", "export_dit_dh", "load_dit_dh"]

HEAD_NUM_HEADS = 16  # of the published heads, all 2048 wide
HEAD_NUM_LAYERS = 2
BASE_SIZE = 4096  # elements of latents for which the shift is 1 (section 4 of the paper)


def dit_dh_table(config: Mapping) -> KeyTable:
    """The keys for a model of `config`, that of a `DiTDHTransformer2DModel`.

    There the blocks of the head are numbered on from those of the backbone.
    """
    depth, head_depth = config["num_layers"], config["head_num_layers"]
    rules = [
        ("s_embedder.proj.{weight,bias}", "proj_in.{weight,bias}"),
        ("x_embedder.proj.{weight,bias}", "head_proj_in.{weight,bias}"),
        ("s_projector.{weight,bias}", "head_condition.{weight,bias}"),
        ("t_embedder.W", "time_proj.frequencies"),
        *end_rules(output=pixel_rows(config["patch_size"], config["in_channels"])),
    ]
    for i in range(depth):
        rules += block_rules(f"blocks.{i}", f"blocks.{i}", swiglu=True)
    for i in range(head_depth):
        rules += block_rules(f"blocks.{depth + i}", f"head_blocks.{i}", swiglu=True)
    return KeyTable(rules, dropped=("pos_embed", "{enc,dec}_feat_rope.freqs_{cos,sin}"))


def dit_dh_config(state: Mapping[str, torch.Tensor]) -> dict:
    """The config of `DiTDHTransformer2DModel` for a published state dict.

    A head that is as wide as the backbone is taken to have two layers, as all published ones.

    Raises:
        ValueError: the state dict is not that of a DiT^DH.
    """
    names = ("s_embedder.proj.weight", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed")
    check_family(state, "DiT^DH", names)
    patches, head_patches, classes, positions = (state[name] for name in names)
    dim, in_channels, patch_size = patches.shape[:3]
    head_dim, total = len(head_patches), count_layers(state, "blocks")
    if dim == head_dim:
        head_num_layers = HEAD_NUM_LAYERS
    else:
        head_num_layers = sum(len(state.get(f"blocks.{i}.norm1.weight", ())) == head_dim for i in range(total))
    heads = attention_heads(dim, None, state.get("enc_feat_rope.freqs_cos"))
    rotary = state.get("dec_feat_rope.freqs_cos")
    head_heads = attention_heads(head_dim, HEAD_NUM_HEADS if rotary is None else None, rotary)
    return {
        "sample_size": square_side(positions.shape[1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": total - head_num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "head_num_layers": head_num_layers,
        "head_num_attention_heads": head_heads,
        "head_attention_head_dim": head_dim // head_heads,
        "num_classes": len(classes) - 1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "prediction_type": "velocity",
        "base_head_layer": None,
        "use_meanflow": False,
    }


def load_dit_dh(
    weights: str | Path,
    vae: Tokenizer | None,
    weak_weights: str | Path | None = None,
    guidance_scale: float | list | dict = 1.0,
    num_inference_steps: int = 49,
    final_sigma: float = 0.001,
    shift: float | None = None,
    dtype: torch.dtype | None = None,
) -> FAEDiTPipeline:
    """The pipeline of a published DiT^DH.

    Args:
        weights: file of the denoiser's weights.
        vae: tokenizer of its latents, `AutoencoderDRoRAE` without fusion.
        weak_weights: file of a weaker DiT^DH, for AutoGuidance (published: scale 1.42 at 256 px, 1.5 at 512 px).
        guidance_scale: as in `FAEDiTPipeline`.
        num_inference_steps: of Euler; the published code counts the points of the grid, one more.
        final_sigma: as in `FAEDiTPipeline`.
        shift: of the scheduler; by default RAE's for latents of this size, sqrt(elements / 4096).
        dtype: of the denoisers; None keeps that of the files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: weights of another family or size, or a weak model of other latents.
    """
    transformer = _denoiser(weights, dtype)
    if shift is None:
        shift = math.sqrt(transformer.config.sample_size**2 * transformer.config.in_channels / BASE_SIZE)
    return FAEDiTPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        guidance_transformer=None if weak_weights is None else _denoiser(weak_weights, dtype),
        final_sigma=final_sigma,
    )


def export_dit_dh(model: DiTDHTransformer2DModel) -> dict[str, torch.Tensor]:
    """The state dict of a model as RAE's code loads it, strictly: with the fixed tables.

    Raises:
        ValueError: its latents are not square, it has a base head, or it predicts clean latents or averages.
    """
    config = model.config
    for name, value in (("prediction_type", "velocity"), ("base_head_layer", None), ("use_meanflow", False)):
        if config[name] != value:
            raise ValueError(f"model must have {name} {value!r} in its published layout, got {config[name]!r}")
    state = dit_dh_table(config).to_published(model.state_dict())
    state["pos_embed"] = model.pos_embed.table.detach().clone()
    grid = model.pos_embed.grid
    if grid[0] != grid[1]:
        raise ValueError(f"model must have a square sample_size in its published layout, got {config.sample_size}")
    state |= rotary_tables("enc_feat_rope", config.attention_head_dim, grid)
    return state | rotary_tables("dec_feat_rope", config.head_attention_head_dim, grid)


def _denoiser(weights, dtype):
    state = read_weights(weights)
    config = dit_dh_config(state)
    return build(DiTDHTransformer2DModel, config, dit_dh_table(config).to_ours(state), dtype)
