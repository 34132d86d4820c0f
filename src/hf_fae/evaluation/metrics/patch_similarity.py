"""Patch similarity within and between images (FAE, arXiv 2512.07829, section 5.4).

All similarities are cosines of tokens, in fp32.
"""

import torch
from torch.nn import functional as F


__all__ = [
    "choose_query",
    "is_near",
    "map_agreement",
    "match_patches",
    "nearest_patches",
    "object_mask",
    "similarity_map",
]


def similarity_map(tokens: torch.Tensor, query: int) -> torch.Tensor:
    """Cosine (N,) of all tokens (N, C) of an image with a query token.

    Raises:
        ValueError: a query outside of the tokens.
    """
    if not 0 <= query < len(tokens):
        raise ValueError(f"query must be from 0 to {len(tokens) - 1}, got {query}")
    return F.cosine_similarity(tokens.float(), tokens[query].float(), dim=-1)


def map_agreement(tokens: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Pearson correlation (B, N) of each patch's similarity map in one space with its map in another.

    The patch itself, always 1, is excluded; constant maps have correlation 0.

    Args:
        tokens, reference: (B, N, C) and (B, N, c) of the same patches.
    """
    count = tokens.shape[1]
    others = ~torch.eye(count, dtype=torch.bool, device=tokens.device)
    centred = []
    for space in (tokens, reference):
        unit = F.normalize(space.float(), dim=-1)
        maps = (unit @ unit.mT)[:, others].unflatten(1, (count, count - 1))
        centred.append(maps - maps.mean(-1, keepdim=True))
    return F.cosine_similarity(*centred, dim=-1)


def object_mask(tokens: torch.Tensor, grid: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Object patches (B, N), bool: K-means with two clusters over the tokens of all images.

    Tokens are normalised to unit length; the object is the cluster with the smaller share of border patches.

    Args:
        tokens: (B, N, C), of images with objects of one kind on any background.
        grid: height and width, N in all.

    Raises:
        ValueError: a grid with another number of cells.
    """
    from sklearn.cluster import KMeans

    height, width = grid
    if height * width != tokens.shape[1]:
        raise ValueError(f"grid must have {tokens.shape[1]} cells as there are tokens, got {grid}")
    unit = F.normalize(tokens.double(), dim=-1).flatten(0, 1).cpu().numpy()
    clusters = torch.from_numpy(KMeans(2, n_init=10, random_state=seed).fit_predict(unit)).view(-1, height, width)
    border = torch.ones(height, width, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    is_first = clusters == 0
    shares = (cluster[:, border].sum() / cluster.sum().clamp_min(1) for cluster in (is_first, ~is_first))
    first, second = shares
    return (is_first if first < second else ~is_first).flatten(1)


def choose_query(tokens: torch.Tensor, mask: torch.Tensor) -> int:
    """The object patch whose similarity map varies most within the object.

    Args:
        tokens: (N, C) of an image.
        mask: (N,) bool, object patches.

    Raises:
        ValueError: an empty mask.
    """
    _check_mask("mask", mask)
    unit = F.normalize(tokens[mask].float(), dim=-1)
    return int(mask.nonzero()[(unit @ unit.T).std(1, correction=0).argmax()])


def nearest_patches(
    first: torch.Tensor, second: torch.Tensor, second_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every token of one image (N, C), the most similar token of another (M, C) within a mask (M,).

    Returns:
        Cosine and index in the second image, (N,) both.

    Raises:
        ValueError: an empty mask.
    """
    _check_mask("second_mask", second_mask)
    cosines = F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).T
    return cosines.masked_fill(~second_mask, -torch.inf).max(1)


def match_patches(
    first: torch.Tensor, second: torch.Tensor, first_mask: torch.Tensor, second_mask: torch.Tensor, count: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best pairs of object patches of two images: mutual nearest neighbours first, then by cosine.

    Args:
        first, second: tokens (N, C) and (M, C).
        first_mask, second_mask: (N,) and (M,) bool, object patches.
        count: maximum number of pairs (16 in the paper), further limited by the patches in `first_mask`.

    Returns:
        Index pairs (K, 2) and their cosines (K,), best first.

    Raises:
        ValueError: an empty mask, or a count below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    _check_mask("first_mask", first_mask)
    cosines, targets = nearest_patches(first, second, second_mask)
    sources = first_mask.nonzero().squeeze(1)
    back = nearest_patches(second, first, first_mask)[1]
    is_mutual = back[targets[sources]] == sources
    best = (cosines[sources] + 10 * is_mutual).argsort(descending=True, stable=True)[:count]  # cosines are at most 1
    chosen = sources[best]
    return torch.stack([chosen, targets[chosen]], dim=1), cosines[chosen]


def is_near(first: torch.Tensor, second: torch.Tensor, width: int) -> torch.Tensor:
    """Whether patches are equal or adjacent, also diagonally, from their indices in a grid of this width."""
    rows, columns = first // width - second // width, first % width - second % width
    return torch.maximum(rows.abs(), columns.abs()) <= 1


def _check_mask(name, mask):
    if not mask.any():
        raise ValueError(f"{name} must have at least one patch, got none of {len(mask)}")
