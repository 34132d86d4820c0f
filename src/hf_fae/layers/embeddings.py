"""Features of noise times."""

import math

import torch
from torch import nn


__all__ = ["RandomFourierFeatures"]


class RandomFourierFeatures(nn.Module):
    """Times (B,) -> sines and cosines (B, 2 * count) in fp32 of 2 pi t w, with fixed frequencies w from N(0, 1).

    Args:
        count: of the frequencies.
        counted: whether the paper counts them among the parameters, see `hf_fae.inspection`.
    """

    def __init__(self, count: int, counted: bool = False):
        super().__init__()
        self.counted = counted
        self.register_buffer("frequencies", torch.randn(count))

    def _apply(self, fn, recurse=True):
        # Rounding would change the frequencies: a cast to half precision leaves them in fp32.
        frequencies = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype != torch.float32:
            self.frequencies = frequencies.to(self.frequencies.device)
        return self

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        angles = 2 * math.pi * times.float()[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
