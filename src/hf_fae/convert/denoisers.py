"""What published DiT-like checkpoints share: rules of keys, sizes, and the fixed tables that their code loads.

DiT, SiT, REPA, LightningDiT and their kin name their weights alike. A `Layout` says how a family differs; sizes, and
LightningDiT's switches, follow from the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..generators.lightning_dit import LightningDiTTransformer2DModel
from ..layers.positions import grid_size, rotary_angles
from ..presets import DETOK_KINDS, DIT_KINDS, DIT_SIZES
from .files import build
from .keys import KeyTable
from .layouts import attention_rules, check_family, count_layers, square_side, vit_block_rules
from .transforms import (
    IDENTITY,
    NEGATE,
    REVERSE_TIME,
    SWAP_HALVES,
    Transform,
    chain,
    first_rows,
    inverse,
    pixel_rows,
    squeeze,
)


__all__ = [
    "DETOK_DIT",
    "DETOK_SIT",
    "DIT",
    "LIGHTNINGDIT",
    "MAETOK_SIT",
    "REPA",
    "SIT",
    "Layout",
    "attention_heads",
    "block_rules",
    "build_denoiser",
    "denoiser_config",
    "denoiser_table",
    "end_rules",
    "export_denoiser",
    "publish_denoiser",
    "rotary_tables",
]

HEADS = {heads * head_dim: heads for _, heads, head_dim in DIT_SIZES.values()}


@dataclass(frozen=True)
class Layout:
    """How the checkpoints of a family differ from REPA's, the plainest.

    Attributes:
        data_time: its time is u = 1 - t, and it predicts x - eps.
        unused_half: it predicts twice the channels, and its sampler ignores the second half.
        linear_patches: its tokens are 1-D, embedded by a linear map.
        blocks: name of the list of blocks.
        config: what all its models have, or the weights do not show.
        dropped: training heads.
    """

    data_time: bool = False
    unused_half: bool = False
    linear_patches: bool = False
    blocks: str = "blocks"
    config: dict = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def patches(self) -> str:
        """Prefix of the embedding of patches."""
        return "x_embedder" if self.linear_patches else "x_embedder.proj"


LIGHTNINGDIT = Layout(data_time=True)
SIT = Layout(data_time=True, unused_half=True, config=DIT_KINDS["sit"])
REPA = Layout(config=DIT_KINDS["sit"], dropped=("projectors.*",))
DIT = Layout(config=DIT_KINDS["dit"])
MAETOK_SIT = Layout(linear_patches=True, config={**DIT_KINDS["sit"], "pos_embed_type": "sincos_1d"})
# l-DeTok's code wraps the blocks, and its GELU is exact.
DETOK_SIT = Layout(data_time=True, blocks="transformer.blocks", config={**DIT_KINDS["sit"], **DETOK_KINDS["sit"]})
DETOK_DIT = Layout(blocks="transformer.blocks", config={**DIT_KINDS["dit"], **DETOK_KINDS["dit"]})


def block_rules(published: str, ours: str, swiglu: bool) -> list[tuple]:
    """Rules of adaLN-zero blocks with SwiGLU or an MLP; gains and q/k norms are optional."""
    rules = [
        (f"{published}.norm{{1,2}}.weight", f"{ours}.norm{{1,2}}.weight"),
        (f"{published}.attn.q_norm.weight", f"{ours}.attn.norm_q.weight"),
        (f"{published}.attn.k_norm.weight", f"{ours}.attn.norm_k.weight"),
        (f"{published}.adaLN_modulation.1.{{weight,bias}}", f"{ours}.modulation.{{weight,bias}}"),
    ]
    if not swiglu:
        return [*rules, *vit_block_rules(published, ours)]
    return [
        *rules,
        *attention_rules(published, ours),
        (f"{published}.mlp.w12.{{weight,bias}}", f"{ours}.ff.net.0.proj.{{weight,bias}}", SWAP_HALVES),
        (f"{published}.mlp.w3.{{weight,bias}}", f"{ours}.ff.net.2.{{weight,bias}}"),
    ]


def end_rules(first_time: Transform = IDENTITY, output: Transform = IDENTITY) -> list[tuple]:
    """Rules of the embeddings of time and class and of the final layer.

    Args:
        first_time: of the map of sinusoids.
        output: of the last linear map.
    """
    return [
        ("t_embedder.mlp.0.weight", "time_embedding.linear_1.weight", first_time),
        ("t_embedder.mlp.0.bias", "time_embedding.linear_1.bias"),
        ("t_embedder.mlp.2.{weight,bias}", "time_embedding.linear_2.{weight,bias}"),
        ("y_embedder.embedding_table.weight", "class_embedding.weight"),
        ("final_layer.norm_final.weight", "norm_out.weight"),
        ("final_layer.adaLN_modulation.1.{weight,bias}", "modulation_out.{weight,bias}"),
        ("final_layer.linear.{weight,bias}", "proj_out.{weight,bias}", output),
    ]


def denoiser_table(layout: Layout, config: Mapping) -> KeyTable:
    """The keys of a family for a model of `config`, that of a `LightningDiTTransformer2DModel`.

    The fixed tables of positions are dropped: ours computes them.
    """
    patch_size, channels = config["patch_size"], config["in_channels"]
    doubled = layout.unused_half or config["prediction_type"] == "epsilon"
    output = [pixel_rows(patch_size, channels * (2 if doubled else 1))]
    if layout.unused_half:
        count = channels * patch_size**2
        output.append(first_rows(count, 2 * count))
    if layout.data_time:
        output.append(NEGATE)
    to_patches = inverse(squeeze(-1, -2)) if layout.linear_patches else IDENTITY
    rules = [
        (f"{layout.patches}.weight", "proj_in.weight", to_patches),
        (f"{layout.patches}.bias", "proj_in.bias"),
        *end_rules(REVERSE_TIME if layout.data_time else IDENTITY, chain(*output)),
        *block_rules(f"{layout.blocks}.{{i}}", "blocks.{i}", config["ff_type"] == "swiglu"),
    ]
    return KeyTable(rules, dropped=("pos_embed", "feat_rope.freqs_{cos,sin}", *layout.dropped))


def denoiser_config(state: Mapping[str, torch.Tensor], layout: Layout, num_attention_heads: int | None = None) -> dict:
    """The config of `LightningDiTTransformer2DModel` for a published state dict.

    Args:
        num_attention_heads: needed for a width that is not DiT's, where no rotary table shows it.

    Raises:
        ValueError: the state dict is not that of a DiT-like denoiser, or its number of heads is unknown.
    """
    names = (f"{layout.patches}.weight", "y_embedder.embedding_table.weight", "pos_embed")
    check_family(state, "a DiT-like denoiser", names)
    patches, classes, positions = (state[name] for name in names)
    dim, in_channels = patches.shape[:2]
    patch_size, count = 1 if layout.linear_patches else patches.shape[-1], positions.shape[1]
    heads = attention_heads(dim, num_attention_heads, state.get("feat_rope.freqs_cos"))
    first = f"{layout.blocks}.0"
    return {
        "sample_size": [1, count] if layout.linear_patches else square_side(count) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": count_layers(state, layout.blocks),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "num_classes": len(classes) - 1,
        "norm_type": "rms_norm" if f"{first}.norm1.weight" in state else "layer_norm",
        "ff_type": "swiglu" if f"{first}.mlp.w12.weight" in state else "gelu",
        "use_rope": "feat_rope.freqs_cos" in state,
        "qk_norm": f"{first}.attn.q_norm.weight" in state,
        "prediction_type": "velocity",
        "base_head_layer": None,
        "use_meanflow": False,
        "pos_embed_type": "sincos",
        **layout.config,
    }


def attention_heads(dim: int, num_attention_heads: int | None, rotary: torch.Tensor | None = None) -> int:
    """Heads of a denoiser: as given, from a table (tokens, head_dim) of rotary positions, or those of DiT's sizes.

    Raises:
        ValueError: none of these.
    """
    heads = num_attention_heads or (HEADS.get(dim) if rotary is None else dim // rotary.shape[-1])
    if heads is None:
        raise ValueError(f"num_attention_heads must be given for a width that is not published, got {dim}")
    return heads


def build_denoiser(
    state: Mapping[str, torch.Tensor],
    layout: Layout,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
) -> LightningDiTTransformer2DModel:
    """A denoiser with the weights of a published state dict; arguments as in `denoiser_config` and `build`.

    Raises:
        ValueError: weights of another family or size.
    """
    config = denoiser_config(state, layout, num_attention_heads)
    return build(LightningDiTTransformer2DModel, config, denoiser_table(layout, config).to_ours(state), dtype)


def publish_denoiser(model: LightningDiTTransformer2DModel, layout: Layout) -> dict[str, torch.Tensor]:
    """The published state dict of a model, with the fixed tables that the family's code loads.

    Raises:
        ValueError: the family has no such model.
    """
    config = model.config
    state = denoiser_table(layout, config).to_published(model.state_dict())
    state["pos_embed"] = model.pos_embed.table.detach().clone()
    if config.use_rope:
        state |= rotary_tables("feat_rope", config.attention_head_dim, model.pos_embed.grid)
    for name, value in denoiser_config(state, layout, config.num_attention_heads).items():
        ours, published = (grid_size(one) if name == "sample_size" else one for one in (config[name], value))
        if ours != published:
            raise ValueError(f"model must have {name} {value!r} in its published layout, got {config[name]!r}")
    return state


def export_denoiser(model: LightningDiTTransformer2DModel) -> dict[str, torch.Tensor]:
    """The state dict of a model as the code of its family loads it, strictly.

    The family follows from the config: l-DeTok's DiT and SiT (exact GELU), MAETok's SiT (1-D positions), DiT (predicts
    noise), SiT (LayerNorm, no rotary positions), LightningDiT.

    Raises:
        ValueError: no family has such a model.
    """
    config = model.config
    is_dit = config.prediction_type == "epsilon"
    if config.ff_type == "exact_gelu":
        layout = DETOK_DIT if is_dit else DETOK_SIT
    elif config.pos_embed_type == "sincos_1d":
        layout = MAETOK_SIT
    elif is_dit:
        layout = DIT
    else:
        is_sit = config.norm_type == "layer_norm" and config.ff_type == "gelu" and not config.use_rope
        layout = SIT if is_sit else LIGHTNINGDIT
    return publish_denoiser(model, layout)


def rotary_tables(prefix: str, head_dim: int, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The buffers `freqs_cos` and `freqs_sin`, (tokens, head_dim), of rotary positions."""
    cos, sin = (angles.repeat_interleave(2, dim=-1) for angles in rotary_angles(head_dim, grid, torch.device("cpu")))
    return {f"{prefix}.freqs_cos": cos, f"{prefix}.freqs_sin": sin}
