"""Masking that tokenizers and generators share: the mask ratio of MAETok and MAR, and its number of visible patches.

Everything is a function of uniform numbers given by the caller, so that each image can have its own (see
`utils.randomness`).
"""

import math

import torch


__all__ = ["count_visible", "truncated_normal_mask_ratio"]


def truncated_normal_mask_ratio(
    uniform: torch.Tensor,
    min_ratio: float = 0.4,
    max_ratio: float = 0.6,
    center: float = 0.6,
    std: float = 0.25,
) -> torch.Tensor:
    """Mask ratios from N(center, std^2) truncated to [min_ratio, max_ratio]; the defaults are MAETok's.

    Args:
        uniform: in [0, 1), any shape.

    Raises:
        ValueError: the bounds do not lie within [0, 1] in this order, or `std` is not positive.
    """
    if not 0 <= min_ratio <= max_ratio <= 1:
        raise ValueError(f"min_ratio and max_ratio must rise within [0, 1], got {min_ratio} and {max_ratio}")
    if not 0 < std < math.inf:
        raise ValueError(f"std must be positive and finite, got {std}")
    # By the inverse cumulative distribution function, in fp64: the tails of a narrow distribution are far out.
    low, high = (torch.special.ndtr(torch.tensor((bound - center) / std).double()) for bound in (min_ratio, max_ratio))
    values = torch.special.ndtri(low + (high - low) * uniform.double().cpu())
    return (center + std * values).clamp(min_ratio, max_ratio).to(uniform)


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """ceil(num_patches (1 - mask_ratio)), the number of patches that stay visible.

    Raises:
        ValueError: `mask_ratio` is not in [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
    return math.ceil(num_patches * (1 - mask_ratio) - 1e-6)  # 10 * (1 - 0.7) is slightly more than 3
