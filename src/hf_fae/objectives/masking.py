"""Which patches a tokenizer does not get to see in training: how many, by the laws of the papers, and which.

All of it follows from uniform numbers that the caller draws, so that they can be an image's own (see `randomness`).
"""

import math

import torch


__all__ = ["count_visible", "truncated_normal_mask_ratio"]


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


def count_visible(places, mask_ratio):
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
    return math.ceil(places * (1 - mask_ratio) - 1e-6)  # 10 * (1 - 0.7) is a little more than 3
