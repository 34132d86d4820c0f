"""Histograms of oriented gradients, a target for masked patches (MaskFeat, arXiv 2112.09133; MAETok)."""

import math

import torch
from torch.nn import functional as F


__all__ = ["hog_features"]

BINS = 9  # of unsigned orientations
CELL = 8  # pixels along each side


def hog_features(images: torch.Tensor, patch_size: int = 16) -> torch.Tensor:
    """Histograms (B, N, 3 * 9 * cells) in fp32 of the patches of images: 108 numbers for patches of 16 pixels.

    Gradients are central differences (0 at the border), separately for each colour. Every pixel adds its magnitude to
    one of nine bins of its orientation, from 0 to pi, in its cell of 8 x 8 pixels. The histogram of a cell and a
    colour has length 1, or 0 where the image is constant. A patch's numbers are ordered by colour, bin and cell.

    Args:
        images: (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: `patch_size` is no multiple of 8, or the images' sides are no multiples of `patch_size`.
    """
    height, width = images.shape[2:]
    if patch_size < CELL or patch_size % CELL:
        raise ValueError(f"patch_size must be a positive multiple of {CELL}, got {patch_size}")
    if height % patch_size or width % patch_size:
        raise ValueError(f"images must have sides that are multiples of {patch_size}, got {height} x {width}")
    pixels = images.float() / 2
    down, right = torch.zeros_like(pixels), torch.zeros_like(pixels)
    down[:, :, 1:-1] = pixels[:, :, 2:] - pixels[:, :, :-2]
    right[..., 1:-1] = pixels[..., 2:] - pixels[..., :-2]
    # Modulo pi: edges from dark to bright and from bright to dark are the same.
    turns = torch.atan2(down, right) / math.pi % 1
    bins = (turns * BINS).long().clamp_max(BINS - 1)
    votes = pixels.new_zeros(len(pixels), 3, BINS, height, width)
    votes.scatter_(2, bins[:, :, None], torch.hypot(down, right)[:, :, None])
    histograms = F.avg_pool2d(votes.flatten(1, 2), CELL).unflatten(1, (3, BINS))
    histograms = histograms / (histograms.square().sum(2, keepdim=True) + 1e-10).sqrt()
    return F.pixel_unshuffle(histograms.flatten(1, 2), patch_size // CELL).flatten(2).transpose(1, 2)
