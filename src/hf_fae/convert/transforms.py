"""Named changes of tensors between published layouts and ours, each with its inverse."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


__all__ = [
    "ADD_ONE",
    "APPEND_ROW",
    "IDENTITY",
    "JOIN_HALVES",
    "NEGATE",
    "REVERSE_TIME",
    "SPLIT_QKV",
    "SWAP_HALVES",
    "TRANSPOSE",
    "Transform",
    "chain",
    "each_half",
    "first_rows",
    "fold_first_position",
    "inverse",
    "pixel_columns",
    "pixel_rows",
    "squeeze",
]


@dataclass(frozen=True)
class Transform:
    """A change of tensors: both functions take the tensors of one side and return those of the other."""

    to_ours: Callable
    to_published: Callable


def chain(*transforms: Transform) -> Transform:
    """Transforms of a single tensor, one after the other on the way to ours."""

    def to_ours(tensor):
        for transform in transforms:
            tensor = transform.to_ours(tensor)
        return tensor

    def to_published(tensor):
        for transform in reversed(transforms):
            tensor = transform.to_published(tensor)
        return tensor

    return Transform(to_ours, to_published)


def inverse(transform: Transform) -> Transform:
    """The same change the other way round."""
    return Transform(transform.to_published, transform.to_ours)


IDENTITY = Transform(lambda tensor: tensor, lambda tensor: tensor)

NEGATE = Transform(torch.neg, torch.neg)

TRANSPOSE = Transform(torch.t, torch.t)

# The gain of a norm, which is stored as its distance from 1: in fp32, as halves would round it.
ADD_ONE = Transform(lambda tensor: tensor.float() + 1, lambda tensor: tensor.float() - 1)

# One linear map of queries, keys and values: rows [q, k, v].
SPLIT_QKV = Transform(lambda tensor: tensor.unflatten(0, (3, -1)).unbind(), lambda q, k, v: torch.cat([q, k, v]))

# Gated feed-forwards: silu(first half) * second half there, first half * silu(second half) in diffusers' SwiGLU.
SWAP_HALVES = Transform(*2 * [lambda tensor: torch.cat(tensor.unflatten(0, (2, -1)).unbind()[::-1])])

# Two maps of the same tokens, such as those of a gated feed-forward: one map with the rows of both.
JOIN_HALVES = Transform(lambda *halves: torch.cat(halves), lambda tensor: tensor.chunk(2))

# A table and, in a tensor of its own, its last row (1, C), such as that of the null class.
APPEND_ROW = Transform(lambda table, row: torch.cat([table, row]), lambda table: (table[:-1], table[-1:]))


def squeeze(*axes: int) -> Transform:
    """Axes of length 1 are dropped; all of them count from the front, or all from the back."""

    def to_ours(tensor):
        if any(tensor.shape[axis] != 1 for axis in axes):
            raise ValueError(f"axes {axes} must be of length 1, got shape {tuple(tensor.shape)}")
        return tensor.squeeze(axes)

    def to_published(tensor):
        for axis in sorted(axes, key=abs):
            tensor = tensor.unsqueeze(axis)
        return tensor

    return Transform(to_ours, to_published)


def pixel_rows(patch_size: int, channels: int) -> Transform:
    """Rows (or entries) of a map to patches: (p1, p2, channel) there, (channel, p1, p2) in ours."""
    count = patch_size**2
    return Transform(
        lambda tensor: tensor.unflatten(0, (count, channels)).transpose(0, 1).flatten(0, 1),
        lambda tensor: tensor.unflatten(0, (channels, count)).transpose(0, 1).flatten(0, 1),
    )


def pixel_columns(patch_size: int, channels: int) -> Transform:
    """Columns of a map from patches: (p1, p2, channel) there, (channel, p1, p2) in ours."""
    return chain(TRANSPOSE, pixel_rows(patch_size, channels), TRANSPOSE)


def first_rows(count: int, total: int) -> Transform:
    """The first `count` of `total` rows (or entries); the others are of no use, and zeros on the way back."""

    def to_ours(tensor):
        if len(tensor) != total:
            raise ValueError(f"tensor must have {total} rows, got shape {tuple(tensor.shape)}")
        return tensor[:count]

    def to_published(tensor):
        return torch.cat([tensor, tensor.new_zeros(total - count, *tensor.shape[1:])])

    return Transform(to_ours, to_published)


def each_half(transform: Transform) -> Transform:
    """The same transform of both halves of the rows."""

    def halves(function):
        return lambda tensor: torch.cat([function(half) for half in tensor.unflatten(0, (2, -1)).unbind()])

    return Transform(halves(transform.to_ours), halves(transform.to_published))


def fold_first_position(ndim: int) -> Transform:
    """A first token (1, 1, C), and learned positions (1, 1 + N, C) of it and of others: ours are (..., C) and (N, C).

    Our first token has its position added to it, and `ndim` axes; on the way back its position is 0.
    """

    def to_ours(token, positions):
        return (token + positions[:, :1]).flatten(0, 3 - ndim), positions[0, 1:]

    def to_published(token, positions):
        return token.view(1, 1, -1), torch.cat([torch.zeros_like(positions[:1]), positions])[None]

    return Transform(to_ours, to_published)


def _rotate_time(weight: torch.Tensor) -> torch.Tensor:
    # cos(w (1 - t)) = cos w cos(wt) + sin w sin(wt), sin(w (1 - t)) = sin w cos(wt) - cos w sin(wt).
    cos, sin = weight.double().chunk(2, dim=1)
    half = cos.shape[1]
    angles = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=weight.device) / half)
    return torch.cat([cos * angles.cos() + sin * angles.sin(), cos * angles.sin() - sin * angles.cos()], dim=1).to(
        weight.dtype
    )


# Sinusoids [cos, sin] of data time u = 1 - t: the map behind them, of noise time t. It is its own inverse.
REVERSE_TIME = Transform(_rotate_time, _rotate_time)
