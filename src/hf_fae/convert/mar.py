"""Published models that generate token by token, and ours: MAR (LTH14), and MAR, RasterAR and RandomAR of l-DeTok.

Files nest averaged weights under `model_ema`. All have the same diffusion head.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..generators.autoregressive import AutoregressiveTransformer2DModel
from ..generators.diffusion_head import head_scheduler
from ..generators.mar import MARTransformer2DModel
from ..pipelines.fae_mar import FAEMARPipeline
from ..pipelines.latent_pipeline import Tokenizer
from ..presets import AR_SIZES, MAR_SIZES
from .files import build, read_weights
from .keys import KeyTable
from .layouts import check_family, count_layers, square_side, vit_block_rules
from .transforms import APPEND_ROW, Transform, chain, fold_first_position, squeeze


__all__ = [
    "autoregressive_config",
    "autoregressive_table",
    "load_autoregressive",
    "load_mar",
    "mar_config",
    "mar_table",
]

MAR_HEADS = {width: heads for _, width, heads, *_ in MAR_SIZES.values()}
AR_HEADS = {width: heads for _, width, heads in AR_SIZES.values()}
CLASSES = (("class_emb.weight", "fake_latent"), "class_embedding.weight", APPEND_ROW)


def _head_rules() -> list[tuple]:
    published, ours = "diffloss.net", "diffusion_head"
    names = {
        "time_embed.mlp.0": "time_embedding.linear_1",
        "time_embed.mlp.2": "time_embedding.linear_2",
        "cond_embed": "condition_proj",
        "input_proj": "proj_in",
        "res_blocks.{i}.in_ln": "blocks.{i}.norm",
        "res_blocks.{i}.mlp.0": "blocks.{i}.linear_1",
        "res_blocks.{i}.mlp.2": "blocks.{i}.linear_2",
        "res_blocks.{i}.adaLN_modulation.1": "blocks.{i}.modulation",
        "final_layer.adaLN_modulation.1": "modulation_out",
        "final_layer.linear": "proj_out",
    }
    return [(f"{published}.{old}.{{weight,bias}}", f"{ours}.{new}.{{weight,bias}}") for old, new in names.items()]


def mar_table() -> KeyTable:
    """The keys of a MAR."""
    blocks = "{encoder,decoder}_blocks.{i}"
    return KeyTable(
        [
            CLASSES,
            ("z_proj.{weight,bias}", "proj_in.{weight,bias}"),
            ("z_proj_ln.{weight,bias}", "norm_in.{weight,bias}"),
            ("{encoder,decoder}_pos_embed_learned", "{encoder,decoder}_position.weight", squeeze(0)),
            ("diffusion_pos_embed_learned", "condition_position.weight", squeeze(0)),
            ("mask_token", "mask_token.weight", squeeze(0)),
            ("decoder_embed.{weight,bias}", "decoder_proj.{weight,bias}"),
            ("{encoder,decoder}_norm.{weight,bias}", "{encoder,decoder}_norm.{weight,bias}"),
            (f"{blocks}.norm{{1,2}}.{{weight,bias}}", f"{blocks}.norm{{1,2}}.{{weight,bias}}"),
            *vit_block_rules(blocks, blocks),
            *_head_rules(),
        ]
    )


def autoregressive_table() -> KeyTable:
    """The keys of a RasterAR or RandomAR.

    The affine maps of its norms are part of the modulation in ours, and the position of its start token is part of
    that token.
    """
    published, ours = "transformer.blocks.{i}", "blocks.{i}"
    norms = tuple(f"{published}.norm{number}.{name}" for number in (1, 2) for name in ("weight", "bias"))
    modulation = tuple(f"{published}.adaLN_modulation.1.{name}" for name in ("weight", "bias"))
    return KeyTable(
        [
            CLASSES,
            ("x_embedder.{weight,bias}", "proj_in.{weight,bias}"),
            ("ln_pre.{weight,bias}", "norm_in.{weight,bias}"),
            (("bos_token", "pos_embed"), ("start_token.weight", "position.weight"), fold_first_position(2)),
            ("target_pos_embed", "next_position.weight", squeeze(0)),
            ("timesteps_embeddings", "step_embedding.weight", chain(squeeze(0), DROP_LAST_ROW)),
            *vit_block_rules(published, ours),
            ((*modulation, *norms), (f"{ours}.modulation.weight", f"{ours}.modulation.bias"), FOLD_NORMS),
            ("final_layer.adaLN_modulation.1.{weight,bias}", "modulation_out.{weight,bias}"),
            *_head_rules(),
        ]
    )


# The step behind the last token, which is never run.
DROP_LAST_ROW = Transform(lambda table: table[:-1], lambda table: torch.cat([table, torch.zeros_like(table[:1])]))


def _fold_norms(weight, bias, gain1, bias1, gain2, bias2):
    # (g n + b) (1 + scale) + shift = n (1 + scale') + shift', with maps to shift, scale and gate of both branches.
    weights, biases = (list(tensor.unflatten(0, (6, -1)).double().unbind()) for tensor in (weight, bias))
    for first, (gain, offset) in ((0, (gain1, bias1)), (3, (gain2, bias2))):
        gain, offset = gain.double(), offset.double()
        weights[first] = weights[first] + offset[:, None] * weights[first + 1]
        biases[first] = biases[first] + offset * biases[first + 1] + offset
        weights[first + 1] = gain[:, None] * weights[first + 1]
        biases[first + 1] = gain * biases[first + 1] + (gain - 1)
    return torch.cat(weights).to(weight.dtype), torch.cat(biases).to(bias.dtype)


def _plain_norms(weight, bias):
    gain = torch.ones(len(bias) // 6, dtype=bias.dtype, device=bias.device)
    return weight, bias, *2 * (gain, torch.zeros_like(gain))


FOLD_NORMS = Transform(_fold_norms, _plain_norms)


def mar_config(state: Mapping[str, torch.Tensor], num_attention_heads: int | None = None) -> dict:
    """The config of `MARTransformer2DModel` for a published state dict.

    Args:
        num_attention_heads: by default that of the published model of this width.

    Raises:
        ValueError: the state dict is not that of a MAR, or has an unknown number of heads.
    """
    positions = ["encoder_pos_embed_learned", "diffusion_pos_embed_learned"]
    check_family(state, "MAR", [*positions, *CLASSES[0], "z_proj.weight", "diffloss.net.input_proj.weight"])
    num_positions, num_tokens = (state[name].shape[1] for name in positions)
    return {
        "encoder_num_layers": count_layers(state, "encoder_blocks"),
        "decoder_num_layers": count_layers(state, "decoder_blocks"),
        "num_buffer_tokens": num_positions - num_tokens,
        **_shared_config(state, "z_proj.weight", num_tokens, num_attention_heads, MAR_HEADS),
    }


def autoregressive_config(
    state: Mapping[str, torch.Tensor], order: str, num_attention_heads: int | None = None
) -> dict:
    """The config of `AutoregressiveTransformer2DModel` for a state dict of l-DeTok's code.

    Args:
        order: `"raster"` (RasterAR) or `"random"` (RandomAR): both have the same keys.
        num_attention_heads: by default that of l-DeTok's model of this width.

    Raises:
        ValueError: the state dict is not that of such a model, or has an unknown number of heads.
    """
    names = ["target_pos_embed", *CLASSES[0], "x_embedder.weight", "diffloss.net.input_proj.weight"]
    check_family(state, "RasterAR or RandomAR", names)
    num_tokens = state["target_pos_embed"].shape[1]
    return {
        "order": order,
        "num_layers": count_layers(state, "transformer.blocks"),
        **_shared_config(state, "x_embedder.weight", num_tokens, num_attention_heads, AR_HEADS),
    }


def _shared_config(state, proj_in, num_tokens, heads, known_heads):
    width, channels = state[proj_in].shape
    heads = heads or known_heads.get(width)
    if heads is None:
        raise ValueError(f"num_attention_heads must be given for a width that is not published, got {width}")
    return {
        "sample_size": square_side(num_tokens),
        "in_channels": channels,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "head_num_layers": count_layers(state, "diffloss.net.res_blocks"),
        "head_hidden_size": len(state["diffloss.net.input_proj.weight"]),
        "num_classes": len(state["class_emb.weight"]),
    }


def load_mar(
    weights: str | Path,
    vae: Tokenizer | None,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    **settings,
) -> FAEMARPipeline:
    """The pipeline of a published MAR.

    Args:
        weights: file of MAR (`checkpoint-last.pth`) or of l-DeTok (`mar_base.pth`, `mar_large.pth`).
        vae: tokenizer of its latents: KL-16, or `load_detok`'s.
        num_attention_heads: as in `mar_config`.
        dtype: of the transformer; None keeps that of the file.
        settings: of `FAEMARPipeline`: `guidance_scale`, `num_inference_steps`, `num_diffusion_steps`, `temperature`
            and `id2label`.

    Raises:
        ValueError: a file of another kind, or a `vae` with other latents.
    """
    state = read_weights(weights, ema=("model_ema",))
    config = mar_config(state, num_attention_heads)
    transformer = build(MARTransformer2DModel, config, mar_table().to_ours(state), dtype)
    return FAEMARPipeline(vae, transformer, head_scheduler(), **settings)


def load_autoregressive(
    weights: str | Path,
    vae: Tokenizer | None,
    order: str,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    **settings,
) -> FAEMARPipeline:
    """The pipeline of a RasterAR or RandomAR of l-DeTok's code.

    Args:
        weights: file of its training.
        vae: tokenizer of its latents.
        order, num_attention_heads: as in `autoregressive_config`.
        dtype, settings: as in `load_mar`.

    Raises:
        ValueError: a file of another kind, or a `vae` with other latents.
    """
    state = read_weights(weights, ema=("model_ema",))
    config = autoregressive_config(state, order, num_attention_heads)
    transformer = build(AutoregressiveTransformer2DModel, config, autoregressive_table().to_ours(state), dtype)
    return FAEMARPipeline(vae, transformer, head_scheduler(), **settings)
