"""Samples of pipelines with one seed per sample, and training images to compare them with."""

import torch
from tqdm import tqdm

from hf_fae.data.images import ImageData


__all__ = ["read_images", "sample_latents"]


@torch.no_grad()
def sample_latents(pipe, conditions: list[int] | list[str], batch_size: int, precision: str = "no", **options):
    """Latents (N, C, h, w) of classes or prompts; the seed of a sample is its number.

    Args:
        precision: "bf16" for autocast, else "no".
        options: of the pipeline's call.
    """
    parts = []
    for start in tqdm(range(0, len(conditions), batch_size), leave=False, unit="batch"):
        part = conditions[start : start + batch_size]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            parts.append(pipe(part, generator=generators, output_type="latent", **options).images)
    return torch.cat(parts)


def read_images(data: ImageData, rows) -> torch.Tensor:
    """Training images (N, 3, H, W) in [-1, 1], by their rows."""
    return torch.stack([data.example(data.train[row])["pixel_values"] for row in rows])
