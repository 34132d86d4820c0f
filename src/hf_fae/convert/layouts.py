"""What families of checkpoints share: rules of transformer blocks, and sizes that the shapes of weights tell."""

import math
from collections.abc import Iterable, Mapping

import torch

from .transforms import SPLIT_QKV


__all__ = ["attention_rules", "check_family", "count_layers", "square_side", "vit_block_rules"]


def attention_rules(published: str, ours: str) -> list[tuple]:
    """Rules of attention as in timm: one linear map for queries, keys and values.

    Args:
        published, ours: names of the blocks, such as `"blocks.{i}"`.
    """
    qkv = tuple(f"{ours}.attn.to_{name}.{{weight,bias}}" for name in "qkv")
    return [
        (f"{published}.attn.qkv.{{weight,bias}}", qkv, SPLIT_QKV),
        (f"{published}.attn.proj.{{weight,bias}}", f"{ours}.attn.to_out.0.{{weight,bias}}"),
    ]


def vit_block_rules(published: str, ours: str) -> list[tuple]:
    """Rules of timm's ViT blocks, without norms: `attention_rules` and an MLP of two linear maps."""
    return [
        *attention_rules(published, ours),
        (f"{published}.mlp.fc1.{{weight,bias}}", f"{ours}.ff.net.0.proj.{{weight,bias}}"),
        (f"{published}.mlp.fc2.{{weight,bias}}", f"{ours}.ff.net.2.{{weight,bias}}"),
    ]


def check_family(state: Mapping[str, torch.Tensor], family: str, names: Iterable[str]) -> None:
    """Refuse the state dict of another family.

    Raises:
        ValueError: `state` lacks one of `names`.
    """
    for name in names:
        if name not in state:
            raise ValueError(
                f"checkpoint must be of {family} with the key {name!r}, got keys such as {list(state)[:3]}"
            )


def count_layers(state: Mapping[str, torch.Tensor], blocks: str) -> int:
    """Number of the blocks whose keys start with `blocks` and a number."""
    prefix = f"{blocks}."
    return 1 + max((int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)), default=-1)


def square_side(count: int) -> int:
    """Rows of a square grid of `count` cells.

    Raises:
        ValueError: `count` is not a square number.
    """
    side = math.isqrt(count)
    if side**2 != count:
        raise ValueError(f"checkpoint must have positions for a square grid, got {count}")
    return side
