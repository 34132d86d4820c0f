"""Which patches a tokenizer does not get to see in training: how many, by the laws of the papers, and which.

All of it follows from uniform numbers that the caller draws, so that they can be an image's own (see `randomness`).
"""

import math

import torch


__all__ = [
    "detok_mask_ratio",
    "draw_patch_mask",
    "draw_visible_patches",
    "falling_mask_ratio",
    "truncated_normal_mask_ratio",
]


def detok_mask_ratio(uniform: torch.Tensor, max_ratio: float = 0.7) -> torch.Tensor:
    """Shares of masked patches, max(0, U(-0.1, max_ratio)) (l-DeTok, arXiv 2507.15856): often none at all.

    Args:
        uniform: in [0, 1), any shape.

    Raises:
        ValueError: `max_ratio` is not in [0, 1).
    """
    if not 0 <= max_ratio < 1:
        raise ValueError(f"max_ratio must be in [0, 1), got {max_ratio}")
    return torch.lerp(torch.full_like(uniform, -0.1), torch.full_like(uniform, max_ratio), uniform).clamp_min(0)


def truncated_normal_mask_ratio(
    uniform: torch.Tensor, min_ratio: float = 0.4, max_ratio: float = 0.6, center: float = 0.6, std: float = 0.25
) -> torch.Tensor:
    """Shares of masked patches from a normal law that is cut to [min_ratio, max_ratio]; the defaults are MAETok's.

    Args:
        uniform: in [0, 1), any shape.

    Raises:
        ValueError: these are no bounds within [0, 1], or `std` is not positive.
    """
    if not 0 <= min_ratio <= max_ratio <= 1:
        raise ValueError(f"min_ratio and max_ratio must rise within [0, 1], got {min_ratio} and {max_ratio}")
    if not 0 < std < math.inf:
        raise ValueError(f"std must be positive and finite, got {std}")
    # Through the inverse of the distribution function, in fp64: the tails of a narrow law are far out.
    low, high = (torch.special.ndtr(torch.tensor((bound - center) / std).double()) for bound in (min_ratio, max_ratio))
    values = torch.special.ndtri(low + (high - low) * uniform.double().cpu())
    return (center + std * values).clamp(min_ratio, max_ratio).to(uniform)


def falling_mask_ratio(step: int, start: float, num_steps: int) -> float:
    """The share at a step of MAETok's second stage: it falls linearly from `start` to 0 at step `num_steps`."""
    return start * max(0.0, 1 - step / num_steps)


def draw_visible_patches(scores: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """Numbers (B, K) of the ceil(N (1 - mask_ratio)) patches of each image that stay, in raster order.

    Args:
        scores: (B, N) uniform numbers; those with the lowest ones stay.
        mask_ratio: one for all images, as so many tokens are in one tensor.

    Raises:
        ValueError: `mask_ratio` is not in [0, 1).
    """
    return scores.argsort(dim=1)[:, : _count_visible(scores.shape[1], mask_ratio)].sort(dim=1).values


def draw_patch_mask(scores: torch.Tensor, mask_ratio: float | torch.Tensor) -> torch.Tensor:
    """Masks (B, N) that are True for all but the ceil(N (1 - mask_ratio)) patches with the lowest scores.

    Args:
        scores: (B, N) uniform numbers.
        mask_ratio: one for all images, or one of each (B,).

    Raises:
        ValueError: `mask_ratio` is one number that is not in [0, 1).
    """
    ranks, places = scores.argsort(dim=1).argsort(dim=1), scores.shape[1]
    if isinstance(mask_ratio, torch.Tensor):
        return ranks >= torch.ceil(places * (1 - mask_ratio.double()) - 1e-6)[..., None]
    return ranks >= _count_visible(places, mask_ratio)


def _count_visible(places, mask_ratio):
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
    return math.ceil(places * (1 - mask_ratio) - 1e-6)  # 10 * (1 - 0.7) is a little more than 3
