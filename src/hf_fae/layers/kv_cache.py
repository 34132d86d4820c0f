"""Keys and values that a causal stack has computed already, in buffers of a fixed size."""

from typing import NamedTuple

import torch


__all__ = ["KVCache", "LayerCache"]


class LayerCache(NamedTuple):
    """One layer's part of a cache: tensors of fixed shapes, as the compiler wants them.

    Attributes:
        keys, values: (batch, length, heads, head_dim), written in place.
        positions: (n,) long, the places of the n tokens that are being added.
        mask: (1, 1, n, length), True where such a token may look.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor

    def write(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values (batch, n, heads, head_dim) of the new tokens, and return all."""
        self.keys.index_copy_(1, self.positions, key.to(self.keys.dtype))
        self.values.index_copy_(1, self.positions, value.to(self.values.dtype))
        return self.keys, self.values


class KVCache:
    """The cache of all layers of a causal stack, empty at first.

    Args:
        num_layers, batch_size, length, heads, head_dim: two buffers a layer of (batch_size, length, heads, head_dim).
        device, dtype: of the buffers.

    Attributes:
        length: tokens that are in it; set it back to write later ones anew.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        length: int,
        heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (batch_size, length, heads, head_dim)
        # Zeros: what a mask hides must be finite all the same.
        self._buffers = [
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in ("keys", "values"))
            for _ in range(num_layers)
        ]
        self._places = torch.arange(length, device=device)
        self.length = 0

    def extend(self, count: int) -> list[LayerCache]:
        """Make room for `count` tokens, which see what is there and themselves in causal order."""
        positions = self._places[self.length : self.length + count]
        mask = (self._places <= positions[:, None])[None, None]
        self.length += count
        return [LayerCache(keys, values, positions, mask) for keys, values in self._buffers]
