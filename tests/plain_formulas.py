"""The formulas of denoisers, written anew with the plainest operations: what tests compare the models with."""

import math

import torch
from torch.nn import functional as F


__all__ = ["adaln_block", "gelu", "layer_norm", "rms_norm", "sinusoids", "swiglu"]


def sinusoids(times, width=256):
    """[cos, sin] of times (B,) with frequencies from 1 down to almost 1 / 10000."""
    angles = times[:, None] * 10000.0 ** -(torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


def rms_norm(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def layer_norm(x, norm):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def swiglu(ff, x):
    value, gate = ff.net[0].proj(x).chunk(2, -1)
    return ff.net[2](value * F.silu(gate))


def gelu(ff, x, approximate="tanh"):
    return ff.net[2](F.gelu(ff.net[0].proj(x), approximate=approximate))


def rotate(x, grid):
    """Queries or keys (B, heads, N, width): the row turns the first half of the pairs, the column the second."""
    width = x.shape[-1]
    frequencies = 10000.0 ** -(torch.arange(0, width // 2, 2) / (width // 2))
    rows, columns = (places.flatten()[:, None] for places in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    turns = torch.polar(torch.ones(()), torch.cat([rows * frequencies, columns * frequencies], -1))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)


def adaln_block(block, tokens, condition, norm=rms_norm, feed_forward=swiglu, grid=None):
    """An adaLN-zero block on tokens (B, N, C); `condition` (B, 1 or N, C) is what its modulation reads.

    With a `grid` queries and keys are rotated.
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition).chunk(6, -1)
    normed, attn = norm(tokens, block.norm1) * (1 + scale1) + shift1, block.attn
    q, k, v = (
        layer(normed).unflatten(-1, (attn.heads, attn.head_dim)).transpose(1, 2)
        for layer in (attn.to_q, attn.to_k, attn.to_v)
    )
    if grid is not None:
        q, k = rotate(q, grid), rotate(k, grid)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(attn.head_dim)).softmax(-1)
    tokens = tokens + gate1 * attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
    normed = norm(tokens, block.norm2) * (1 + scale2) + shift2
    return tokens + gate2 * feed_forward(block.ff, normed)
