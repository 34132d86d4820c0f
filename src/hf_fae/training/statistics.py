"""Means and standard deviations over a data set."""

from collections.abc import Iterable

import torch


__all__ = ["channel_statistics"]


def channel_statistics(samples: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (C,) over all but the last axis of tensors (..., C), summed in fp64, given in fp32.

    Raises:
        ValueError: there are no samples.
    """
    count, total, squares = 0, 0.0, 0.0
    for sample in samples:
        rows = sample.detach().reshape(-1, sample.shape[-1]).double()
        count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
    if count == 0:
        raise ValueError("samples must hold at least one tensor, got none")
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float()
