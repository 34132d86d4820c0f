"""Image-text retrieval: recall at k, and a linear map to text embeddings for encoders without a text tower.

The protocol is FAE's (arXiv 2512.07829, table 4): COCO, with SigLIP 2's text tower and pooling head.
"""

import torch
from torch.nn import functional as F

from ...latents import check_finite


__all__ = ["LinearTextAlignment", "pair_up", "recall_at_k"]

_ROWS = 1024  # queries that are ranked at a time


def recall_at_k(
    similarity: torch.Tensor,
    query_groups: torch.Tensor,
    item_groups: torch.Tensor,
    k: tuple[int, ...] | list[int] = (1, 5, 10),
) -> dict[int, float]:
    """Share of queries with an item of their group among the first k: fractions in [0, 1].

    As in COCO's protocol, one of an image's five captions is enough. Ties rank items of other groups first.

    Args:
        similarity: (Q, D) of queries and items.
        query_groups, item_groups: (Q,) and (D,) long, equal for queries and items that match.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite values, a k below 1, or a query without an item.
    """
    if similarity.shape != (len(query_groups), len(item_groups)) or not len(query_groups):
        shape = (len(query_groups), len(item_groups))
        raise ValueError(f"similarity must be of {shape} queries and items, got {tuple(similarity.shape)}")
    if not k or min(k) < 1:
        raise ValueError(f"k must be positive numbers, got {list(k)}")
    check_finite("similarity", similarity)
    ranks = []
    for scores, groups in zip(similarity.split(_ROWS), query_groups.split(_ROWS), strict=True):
        is_own = groups[:, None] == item_groups
        if not is_own.any(1).all():
            raise ValueError(f"query_groups must be among item_groups, got {groups[~is_own.any(1)][0].item()}")
        best = scores.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
        ranks.append(((scores >= best) & ~is_own).sum(1))
    ranks = torch.cat(ranks)
    return {count: (ranks < count).double().mean().item() for count in k}


def pair_up(
    image_ids: torch.Tensor, caption_ids: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Unique images and captions, and the groups that match: COCO's rows repeat an image five times.

    Images and captions connected by rows, directly or through others, form one group: an identical caption matches all
    of its images.

    Args:
        image_ids, caption_ids: (N,) long, equal for identical images and captions.

    Returns:
        For images and for captions, the row of the first occurrence of each, and its group.
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    found = [np.unique(ids.numpy(), return_index=True, return_inverse=True)[1:] for ids in (image_ids, caption_ids)]
    (image_rows, images), (caption_rows, captions) = found
    count = len(image_rows) + len(caption_rows)
    edges = (np.ones(len(image_ids)), (images, captions + len(image_rows)))
    groups = torch.from_numpy(connected_components(coo_array(edges, shape=(count, count)), directed=False)[1]).long()
    image_groups, caption_groups = groups.split([len(image_rows), len(caption_rows)])
    return (torch.from_numpy(image_rows), image_groups), (torch.from_numpy(caption_rows), caption_groups)


class LinearTextAlignment:
    """Ridge regression from the mean token of an image to the embedding of its caption; in fp64 on the CPU.

    For encoders without a text tower. Inputs are standardised per dimension; by default the penalty of a grid with the
    smallest generalised cross-validation error (Golub, Heath and Wahba 1979) is chosen. Embeddings are centred on the
    mean caption: regression shrinks towards it, and captions near it would match every image.

    Args:
        features: (N, C), of the training split.
        text_embeds: (N, D), of the captions.
        penalty: times N.

    Attributes:
        penalty: the chosen one.

    Raises:
        ValueError: fewer than 2 images, shapes that do not fit, NaN or infinite values.
    """

    PENALTIES = tuple(10 ** (exponent / 4) for exponent in range(-16, 13))

    def __init__(self, features: torch.Tensor, text_embeds: torch.Tensor, penalty: float | None = None):
        if features.ndim != 2 or text_embeds.ndim != 2 or not 2 <= len(features) == len(text_embeds):
            shapes = f"{tuple(features.shape)} and {tuple(text_embeds.shape)}"
            raise ValueError(f"features and text_embeds must have shapes (N, C) and (N, D) with N > 1, got {shapes}")
        check_finite("features", features)
        check_finite("text_embeds", text_embeds)
        inputs, targets = features.double().cpu(), text_embeds.double().cpu()
        self.mean, self.text_mean = inputs.mean(0), targets.mean(0)
        self.std = inputs.std(0, correction=0).clamp_min(1e-6)
        inputs, targets = (inputs - self.mean) / self.std, targets - self.text_mean
        count = len(inputs)
        variances, directions = torch.linalg.eigh(inputs.T @ inputs / count)
        variances = variances.clamp_min(0)
        projected = directions.T @ (inputs.T @ targets) / count

        def validation_error(penalty):
            shrunk = 1 / (variances + penalty)
            explained = projected.square().sum(1) * (2 * shrunk - variances * shrunk.square())
            freedom = 1 + (variances * shrunk).sum()
            return (targets.square().sum() / count - explained.sum()) / (1 - freedom / count) ** 2

        self.penalty = min(self.PENALTIES, key=validation_error) if penalty is None else penalty
        self.weight = directions @ (projected / (variances + self.penalty)[:, None])

    def image_embeds(self, features: torch.Tensor) -> torch.Tensor:
        """(M, D) fp32, of unit length, of features (M, C)."""
        return F.normalize((features.double().cpu() - self.mean) / self.std @ self.weight, dim=-1).float()

    def text_embeds(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """(M, D) fp32, of unit length, of the text encoder's embeddings (M, D)."""
        return F.normalize(text_embeds.double().cpu() - self.text_mean, dim=-1).float()
