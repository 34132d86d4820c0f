"""Keys and values of a causal stack, cached in buffers of a fixed size."""

from typing import NamedTuple

import torch


__all__ = ["KVCache", "LayerCache"]


class LayerCache(NamedTuple):
    """One layer's part of a cache.

    Attributes:
        keys, values: (batch, heads, places, head_dim), written in place; the entries of a head are contiguous.
        positions: (n,) long, the places of the n tokens that are being added.
        mask: (1, 1, n, places), True where such a token attends.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor

    def write(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values (batch, n, heads, head_dim) of new tokens and return all of them in this layout."""
        for buffer, new in ((self.keys, key), (self.values, value)):
            buffer.index_copy_(2, self.positions, new.transpose(1, 2).to(buffer.dtype))
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)


class KVCache:
    """The cache of all layers of a causal stack, initially empty.

    Args:
        num_layers, batch_size, places, heads, head_dim: two buffers a layer of (batch_size, heads, places, head_dim).
        device, dtype: of the buffers.
        static: read whole buffers, so that shapes are static for the compiler. Otherwise only the filled part is read,
            on average half of it.

    Attributes:
        length: number of cached tokens; lower it to overwrite the later ones.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        places: int,
        heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        static: bool = False,
    ):
        shape = (batch_size, heads, places, head_dim)
        # Zeros: masked entries must be finite, too.
        self._buffers = [
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in ("keys", "values"))
            for _ in range(num_layers)
        ]
        self._places, self._static = torch.arange(places, device=device), static
        self.length = 0

    def extend(self, count: int) -> list[LayerCache]:
        """Make room for `count` tokens, which attend causally to the cached tokens and to each other."""
        positions = self._places[self.length : self.length + count]
        self.length += count
        read = len(self._places) if self._static else self.length
        mask = (self._places[:read] <= positions[:, None])[None, None]
        return [LayerCache(keys[:, :, :read], values[:, :, :read], positions, mask) for keys, values in self._buffers]
