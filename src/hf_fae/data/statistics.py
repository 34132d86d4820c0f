"""Means and standard deviations over a data set, and how they get into a saved tokenizer."""

import itertools
from collections.abc import Iterable, Iterator
from operator import length_hint
from pathlib import Path

import torch

from ..autoencoders.fae import AutoencoderFAE
from ..autoencoders.frozen_encoder import frozen_features
from ..latents import LatentAutoencoderMixin
from .images import ImageData
from .protocol import TrainingData


__all__ = [
    "channel_statistics",
    "measure_feature_statistics",
    "measure_latent_statistics",
    "measure_sample_statistics",
    "store_latent_statistics",
]

VARIANCE_EPS = 1e-5  # RAE's: an element of the latents may be the same in all images


def channel_statistics(samples: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (C,) of tensors (..., C) over all other axes: summed in fp64, returned in fp32.

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


@torch.no_grad()
def measure_latent_statistics(
    model: LatentAutoencoderMixin, data: ImageData, count: int | None, batch_size: int, num_workers: int = 0
) -> None:
    """Set a tokenizer's latent statistics to those of the posterior modes of training images.

    They are per channel or per element, as the tokenizer has them.

    Args:
        data: each image is used once, as training sees it.
        count: number of images; None for all. At most all, unless they are streamed.
        batch_size, num_workers: as in `TrainingData.batches`.
    """
    shape = model.latents_mean.shape
    model.set_latent_statistics(torch.zeros_like(model.latents_mean), torch.ones_like(model.latents_std))
    images = _training_images(data, count, data.batches(batch_size, num_workers=num_workers))
    latents = (model.encode(batch.to(model.device)).latent_dist.mode() for batch in images)
    per_channel = shape[1:].numel() == 1
    mean, std = channel_statistics(z.movedim(1, -1) if per_channel else z.flatten(1) for z in latents)
    model.set_latent_statistics(mean.view(shape), (std.square() + VARIANCE_EPS).sqrt().view(shape))


def _training_images(data: ImageData, count: int | None, batches: Iterator[dict]) -> Iterator[torch.Tensor]:
    """The first `count` training images, in batches (B, 3, H, W)."""
    left = len(data) if count is None else count if data.args.streaming else min(count, len(data))
    while left > 0:
        images = next(batches)["pixel_values"][:left]
        left -= len(images)
        yield images


def measure_feature_statistics(
    model: AutoencoderFAE, data: TrainingData, count: int, batch_size: int, num_workers: int = 0
) -> None:
    """Set an FAE's feature statistics to those of training images.

    Args:
        data: with or without cached features.
        count: number of images, rounded up to whole batches; at most an epoch, unless they are streamed.
        batch_size, num_workers: as in `TrainingData.batches`.
    """
    batches = data.batches(batch_size, num_workers=num_workers)
    features = _training_features(model, data, count, batch_size, batches)
    model.set_feature_statistics(*channel_statistics(features for features, _ in features))


@torch.no_grad()
def measure_sample_statistics(
    model: AutoencoderFAE, data: TrainingData, count: int, batch_size: int, num_workers: int = 0
) -> None:
    """Set an FAE's latent statistics to those of posterior samples of training images.

    Arguments as in `measure_feature_statistics`.
    """
    batches = data.batches(batch_size, num_workers=num_workers)
    features = _training_features(model, data, count, batch_size, batches)
    posteriors = (model.encode_features(*batch).latent_dist for batch in features)
    mean, std = channel_statistics(posterior.sample().movedim(1, -1) for posterior in posteriors)
    model.set_latent_statistics(mean.view_as(model.latents_mean), std.view_as(model.latents_std))


def _training_features(model, data, count, batch_size, batches):
    """Features and grids of the first `count` training images, in whole batches."""
    count = min(count, length_hint(data, count))
    for batch in itertools.islice(batches, -(-count // batch_size)):
        inputs = {name: batch[name].to(model.device) for name in ("pixel_values", "features") if name in batch}
        yield frozen_features(model, inputs)


def store_latent_statistics(folder: str | Path, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Replace the latent statistics, and nothing else, in the weights of a saved tokenizer.

    Each file is whole at any moment, either the old one or the new one.

    Raises:
        ValueError: `folder` holds no weights with statistics of this shape.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    values, stored = {"latents_mean": mean, "latents_std": std}, set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), values.keys() & set(file.keys())
        if not names:
            continue
        tensors = load_file(path)
        for name in names:
            if values[name].shape != tensors[name].shape:
                raise ValueError(
                    f"{name} in {str(path)!r} has shape {tuple(tensors[name].shape)}, got {tuple(values[name].shape)}"
                )
            tensors[name] = values[name].cpu().float().contiguous()
        save_file(tensors, path.with_suffix(".part"), metadata)
        path.with_suffix(".part").replace(path)
        stored |= names
    if stored != values.keys():
        raise ValueError(f"folder {str(folder)!r} holds no weights with latents_mean and latents_std")
