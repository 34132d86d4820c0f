"""Means and standard deviations over a data set."""

from collections.abc import Iterable, Iterator

import torch

from ..latents import LatentAutoencoderMixin
from .images import ImageData


__all__ = ["channel_statistics", "measure_latent_statistics", "training_images"]

VARIANCE_EPS = 1e-5  # RAE's: an element of the latents may be the same in all pictures


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


def training_images(
    data: ImageData, count: int | None, batch_size: int, num_workers: int = 0
) -> Iterator[torch.Tensor]:
    """Batches (B, 3, H, W) of training pictures, each of them once, as they come in training.

    Args:
        count: of how many; None for all. At most all, unless they are streamed.
    """
    left = len(data) if count is None else count if data.args.streaming else min(count, len(data))
    batches = data.batches(batch_size, num_workers=num_workers)
    while left > 0:
        images = next(batches)["pixel_values"][:left]
        left -= len(images)
        yield images


@torch.no_grad()
def measure_latent_statistics(model: LatentAutoencoderMixin, images: Iterable[torch.Tensor]) -> None:
    """Set a tokenizer's latent statistics to those of the modes of the posteriors of images (B, 3, H, W).

    They are taken per channel or per element, as the tokenizer has them.
    """
    shape = model.latents_mean.shape
    model.set_latent_statistics(torch.zeros_like(model.latents_mean), torch.ones_like(model.latents_std))
    latents = (model.encode(batch.to(model.device)).latent_dist.mode() for batch in images)
    per_channel = shape[1:].numel() == 1
    mean, std = channel_statistics(z.movedim(1, -1) if per_channel else z.flatten(1) for z in latents)
    model.set_latent_statistics(mean.view(shape), (std.square() + VARIANCE_EPS).sqrt().view(shape))
