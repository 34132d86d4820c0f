"""Distances between samples and a reference, as functions of features: in fp64, independent of batching.

Features are rows of matrices (N, D), of any dtype, finite.
"""

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch.nn import functional as F

from ...latents import check_finite


__all__ = [
    "GaussianStatistics",
    "clip_score",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
    "sliced_distance",
]

# Rows per summation: rounding is reproducible only if it does not depend on how features are batched.
_BLOCK = 1024


def _check(name: str, features: torch.Tensor, width: int | None = None, at_least: int = 1) -> None:
    """Require features (N, D).

    Raises:
        ValueError: another shape or width, fewer than `at_least` samples, NaN or infinite values.
    """
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        raise ValueError(f"{name} must have shape (N, {width or 'D'}), got {tuple(features.shape)}")
    if len(features) < at_least:
        raise ValueError(f"{name} must hold at least {at_least} samples, got {len(features)}")
    check_finite(name, features)


def _blocks(batches: Iterable[torch.Tensor], name: str) -> Iterator[torch.Tensor]:
    """The rows of all batches, `_BLOCK` at a time, in fp64 on the CPU; every block reuses the same memory."""
    block, filled = None, 0
    for batch in batches:
        _check(name, batch, None if block is None else block.shape[1], at_least=0)
        if block is None:
            block = torch.empty(_BLOCK, batch.shape[1], dtype=torch.float64)
        rows = batch.detach().cpu()
        while len(rows):
            part = rows[: _BLOCK - filled]
            block[filled : filled + len(part)] = part
            rows, filled = rows[len(part) :], filled + len(part)
            if filled == _BLOCK:
                yield block
                filled = 0
    if filled:
        yield block[:filled]


class GaussianStatistics:
    """Mean (D,) and covariance (D, D) of features, in fp64 on the CPU; `count` samples, None if unknown.

    Args:
        mean, covariance: tensors or arrays, for example of a reference file; the covariance is unbiased.

    Raises:
        ValueError: shapes that do not fit each other, NaN or infinite values.
    """

    def __init__(self, mean, covariance, count: int | None = None):
        self.mean = torch.as_tensor(mean, dtype=torch.float64, device="cpu")
        self.covariance = torch.as_tensor(covariance, dtype=torch.float64, device="cpu")
        self.count = count
        if self.mean.ndim != 1:
            raise ValueError(f"mean must have shape (D,), got {tuple(self.mean.shape)}")
        if self.covariance.shape != 2 * self.mean.shape:
            raise ValueError(
                f"covariance must have shape {tuple(2 * self.mean.shape)}, got {tuple(self.covariance.shape)}"
            )
        check_finite("mean", self.mean)
        check_finite("covariance", self.covariance)

    @classmethod
    def of(cls, batches: Iterable[torch.Tensor], name: str = "features") -> "GaussianStatistics":
        """The statistics of batches (B, D), in one pass.

        Args:
            name: of the batches in errors.

        Raises:
            ValueError: fewer than 2 samples, batches that are not (B, D) of one width, NaN or infinite values.
        """
        count = 0
        for block in _blocks(batches, name):
            if count == 0:
                # Shifted by about the mean: squares of deviations do not cancel against squares of the mean.
                shift = block.mean(0)
                total = torch.zeros_like(shift)
                products = torch.zeros(len(shift), len(shift), dtype=torch.float64)
            block -= shift
            total += block.sum(0)
            products.addmm_(block.T, block)
            count += len(block)
        if count < 2:
            raise ValueError(f"{name} must hold at least 2 samples, got {count}")
        offset = total / count
        return cls(shift + offset, products.addr_(offset, offset, alpha=-count).div_(count - 1), count)


def _square_root(covariance: torch.Tensor) -> torch.Tensor:
    """A (D, r) with A A^T = covariance of rank r; directions with variance at rounding level are dropped."""
    noise = torch.finfo(torch.float64).eps * len(covariance)
    root, failed = torch.linalg.cholesky_ex(covariance)
    pivots = root.diagonal().square()
    if not failed and pivots.min() > noise * pivots.max():
        return root  # full rank: ten times faster than eigenvectors
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > noise * variances[-1]
    return directions[:, kept] * variances[kept].sqrt()


def frechet_distance(samples: GaussianStatistics, reference: GaussianStatistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the FID of arXiv 1706.08500 where features are Inception's.

    With C1 = A A^T and C2 = B B^T, the trace of the root is the sum of the singular values of A^T B, also for singular
    covariances. Distances of no more samples than dimensions are computed, with a bias warning.

    Raises:
        ValueError: statistics of different widths.
    """
    width = len(reference.mean)
    if len(samples.mean) != width:
        raise ValueError(f"samples must have the {width} dimensions of reference, got {len(samples.mean)}")
    for name, statistics in (("samples", samples), ("reference", reference)):
        if statistics.count is not None and statistics.count <= width:
            warnings.warn(
                f"{name} are {statistics.count} in {width} dimensions: the distance is biased upwards",
                stacklevel=2,
            )
    root = torch.linalg.svdvals(_square_root(samples.covariance).T @ _square_root(reference.covariance)).sum()
    means = (samples.mean - reference.mean).square().sum()
    distance = means + samples.covariance.trace() + reference.covariance.trace() - 2 * root
    return max(distance.item(), 0.0)  # rounding can make it negative


def kernel_distance(
    samples: torch.Tensor, reference: torch.Tensor, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the squared MMD with kernel (x.y / D + 1)^3.

    The KID of arXiv 1801.01401 where features (N, D) are Inception's, by torch-fidelity with its default seed. Fewer
    samples than `subset_size` lower it to their number, with a warning.

    Raises:
        ValueError: sets or subsets of fewer than 2 samples, features of different widths, NaN or infinite values.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    _check("samples", samples, at_least=2)
    _check("reference", reference, samples.shape[1], at_least=2)
    if subset_size < 2:
        raise ValueError(f"subset_size must be at least 2, got {subset_size}")
    size = min(subset_size, len(samples), len(reference))
    if size < subset_size:
        warnings.warn(
            f"subset_size is lowered from {subset_size} to {size}: "
            f"there are {len(samples)} samples and {len(reference)} in the reference",
            stacklevel=2,
        )
    result = kid_features_to_metric(
        samples.detach().double(),
        reference.detach().double(),
        kid_subsets=subsets,
        kid_subset_size=size,
        verbose=False,
    )
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def sliced_distance(samples: torch.Tensor, reference: torch.Tensor, directions: int = 1000, seed: int = 2020) -> float:
    """3 D times the squared 2-Wasserstein distance of projections, the mean over random unit directions.

    The MIND of arXiv 2605.06797 where features (N, D) are Inception's. Of the larger set a fixed random choice of as
    many features as the smaller one has is compared.

    Raises:
        ValueError: no samples, features of different widths, NaN or infinite values.
    """
    _check("samples", samples)
    _check("reference", reference, samples.shape[1])
    count, width = min(len(samples), len(reference)), samples.shape[1]
    generator = torch.Generator().manual_seed(seed)
    both = [
        features if len(features) == count else features[torch.randperm(len(features), generator=generator)[:count]]
        for features in (samples, reference)
    ]
    one, other = (features.detach().cpu().double() for features in both)
    generator.manual_seed(seed)  # the directions do not depend on the sizes
    slices = F.normalize(torch.randn(directions, width, generator=generator, dtype=torch.float64), dim=1)
    total = 0.0
    for part in slices.split(64):  # all projections of 50,000 features would take 800 MB
        gaps = (one @ part.T).sort(0).values - (other @ part.T).sort(0).values
        total += gaps.square().mean(0).sum().item()
    return 3 * width * total / directions


def inception_score(logits: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) | p(y)), in [1, K], from logits (N, K): mean and standard deviation over `splits` splits.

    arXiv 1606.03498, by torch-fidelity. The order is kept, as in ADM's evaluator: every split must mix the classes.

    Raises:
        ValueError: fewer samples than `splits`, not (N, K), NaN or infinite values.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    _check("logits", logits, at_least=splits)
    result = isc_features_to_metric(logits.detach(), splits, shuffle=False)  # computed in fp64
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]


def precision_recall(samples: torch.Tensor, reference: torch.Tensor, neighbours: int = 3) -> tuple[float, float]:
    """The share of samples (N, D) in the manifold of the reference, and the reverse: both in [0, 1].

    A manifold is the union of balls around its points that reach to their `neighbours`-th nearest neighbour
    (arXiv 1904.06991), by torch-fidelity.

    Raises:
        ValueError: at most `neighbours` samples, features of different widths, NaN or infinite values.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    _check("samples", samples, at_least=neighbours + 1)
    _check("reference", reference, samples.shape[1], at_least=neighbours + 1)
    # A thousand rows of distances at a time: all distances of 50,000 samples would take 20 GB.
    result = prc_features_to_metric(
        samples.detach().double(),
        reference.detach().double(),
        prc_neighborhood=neighbours,
        prc_batch_size=1000,
        save_cpu_ram=True,
        verbose=False,
    )
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def clip_score(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> float:
    """Mean over pairs of max(100 cos, 0) of embeddings (N, D): arXiv 2104.08718, scaled by the common 100, not 2.5.

    Raises:
        ValueError: no samples, another number or width of texts than of images, NaN or infinite values.
    """
    _check("image_embeds", image_embeds)
    _check("text_embeds", text_embeds, image_embeds.shape[1])
    if len(text_embeds) != len(image_embeds):
        raise ValueError(f"text_embeds must be as many as the {len(image_embeds)} images, got {len(text_embeds)}")
    cosines = F.cosine_similarity(image_embeds.detach().double(), text_embeds.detach().double())
    return (100 * cosines).clamp_min(0).mean().item()
