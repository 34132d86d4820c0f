"""The distribution of latents: mixture modes (MAETok, arXiv 2502.03444, appendix B.3), moments, spectra.

All in fp64 on the CPU.
"""

import math
from dataclasses import dataclass

import torch


__all__ = ["ReducedSpaces", "channel_moments", "mode_count_curve", "power_spectrum", "reduce_spaces"]


@dataclass
class ReducedSpaces:
    """Comparable spaces: of one dimension, each coordinate with zero mean and unit variance.

    Attributes:
        train, held_out: space -> (N, dimension).
        dimension: the common dimension.
        shares: space -> the share of its variance that these dimensions explain.
        variances: space -> all of its principal variances, in descending order.
    """

    train: dict[str, torch.Tensor]
    held_out: dict[str, torch.Tensor]
    dimension: int
    shares: dict[str, float]
    variances: dict[str, torch.Tensor]


def reduce_spaces(
    train: dict[str, torch.Tensor],
    held_out: dict[str, torch.Tensor],
    share: float = 0.9,
    max_dimension: int | None = None,
) -> ReducedSpaces:
    """Project flattened images onto the principal components of the training part, equally many in every space.

    Their number is the smallest that explains more than `share` of the variance of each space (MAETok's protocol), at
    most as many as every space has.

    Args:
        train, held_out: space -> (N, ...), flattened; N is the same for all spaces of a part.
        max_dimension: upper limit.

    Raises:
        ValueError: fewer than 2 training images, or a space that is constant.
    """
    components = {name: _principal_components(name, space.flatten(1).double()) for name, space in train.items()}
    variances = {name: values for name, (_, values, _) in components.items()}
    explained = {name: values.cumsum(0) / values.sum() for name, values in variances.items()}
    dimension = max(int((shares <= share).sum()) + 1 for shares in explained.values())
    limits = [len(values) for values in variances.values()] + [max_dimension or dimension]
    dimension = min(dimension, *limits)

    def project(name, space):
        mean, values, axes = components[name]
        return (space.flatten(1).double() - mean) @ axes[:, :dimension] / values[:dimension].sqrt()

    return ReducedSpaces(
        {name: project(name, space) for name, space in train.items()},
        {name: project(name, space) for name, space in held_out.items()},
        dimension,
        {name: shares[dimension - 1].item() for name, shares in explained.items()},
        variances,
    )


def _principal_components(name, points):
    """Mean (D,), variances (K,) and axes (D, K) of points (N, D), from the smaller of the two Gram matrices."""
    if len(points) < 2:
        raise ValueError(f"train must have at least 2 images, got {len(points)}")
    mean = points.mean(0)
    centred = points - mean
    is_wide = points.shape[1] > len(points)
    variances, axes = torch.linalg.eigh((centred @ centred.T if is_wide else centred.T @ centred) / len(points))
    variances, axes = variances.flip(0), axes.flip(1)
    known = variances > variances[0] * 1e-12
    if not variances[0] > 0:
        raise ValueError(f"train must vary, got a constant space {name!r}")
    variances, axes = variances[known], axes[:, known]
    if is_wide:
        axes = centred.T @ axes / (len(points) * variances).sqrt()
    return mean, variances, axes


def mode_count_curve(
    train: torch.Tensor,
    held_out: torch.Tensor,
    components: list[int],
    covariance_type: str = "full",
    reg: float = 1e-6,
    max_iter: int = 500,
    seed: int = 0,
) -> list[dict]:
    """Negative log-likelihood of Gaussian mixtures by number of components (scikit-learn, k-means initialisation).

    Args:
        train, held_out: (N, D) and (M, D).
        components: numbers of components.
        covariance_type: "full", "tied", "diag" or "spherical".
        reg: added to the diagonals of covariances.
        max_iter: iterations of expectation maximisation.

    Returns:
        For each mixture {"components", "nll", "held_out_nll", "iterations", "converged"}; likelihoods are means over
        images, in nats.

    Raises:
        ValueError: fewer training images than components, or no held-out images.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if len(train) < max(components):
        raise ValueError(f"components must be at most the {len(train)} training images, got {max(components)}")
    if not len(held_out):
        raise ValueError("held_out must have images, got none")
    train, held_out = train.double().cpu().numpy(), held_out.double().cpu().numpy()
    curve = []
    for count in components:
        mixture = GaussianMixture(
            count, covariance_type=covariance_type, reg_covar=reg, max_iter=max_iter, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # reported in the result
            mixture.fit(train)
        curve.append(
            {
                "components": count,
                "nll": -float(mixture.score(train)),
                "held_out_nll": -float(mixture.score(held_out)),
                "iterations": int(mixture.n_iter_),
                "converged": bool(mixture.converged_),
            }
        )
    return curve


def channel_moments(latents: torch.Tensor) -> dict:
    """Moments of the channels of latents (N, C, h, w), and their effective rank.

    Returns:
        "mean", "std", "skewness", "excess_kurtosis": lists of C numbers (the last two are 0 for constant channels);
        "effective_rank": exp of the entropy of the normalised eigenvalues of the channels' covariance, from 1 to C
        (Roy and Vetterli 2007).
    """
    values = latents.double().movedim(1, -1).flatten(0, -2)
    mean = values.mean(0)
    centred = values - mean
    std = centred.square().mean(0).sqrt()
    standard = centred / std.clamp_min(1e-12)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / len(values)).clamp_min(0)
    weights = eigenvalues / eigenvalues.sum().clamp_min(1e-300)
    entropy = -torch.xlogy(weights, weights).sum().item()
    return {
        "mean": mean.tolist(),
        "std": std.tolist(),
        "skewness": standard.pow(3).mean(0).tolist(),
        "excess_kurtosis": torch.where(std > 1e-12, standard.pow(4).mean(0) - 3, 0).tolist(),
        "effective_rank": math.exp(entropy),
    }


def power_spectrum(latents: torch.Tensor) -> dict[str, list]:
    """Power of latents (N, C, h, w) by spatial frequency, averaged over directions, channels and images.

    White noise of unit variance has power 1 everywhere; the mean over all frequencies is the mean square.

    Returns:
        "frequency": in cycles per cell, multiples of 1 / max(h, w), diagonal ones up to 0.71; "power": mean at
        each; "cells": the number of Fourier coefficients in each mean.
    """
    height, width = latents.shape[2:]
    power = torch.zeros(height, width, dtype=torch.float64)
    for batch in latents.split(256):
        power += torch.fft.fft2(batch.double()).abs().square().mean(1).sum(0).cpu()
    power /= len(latents) * height * width
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None].double(), torch.fft.fftfreq(width)[None].double())
    rings = (radius * max(height, width)).round().long().flatten()
    cells = torch.bincount(rings)
    sums = torch.zeros(len(cells), dtype=torch.float64).index_add(0, rings, power.flatten())
    filled = cells > 0
    return {
        "frequency": (torch.arange(len(cells))[filled].double() / max(height, width)).tolist(),
        "power": (sums[filled] / cells[filled]).tolist(),
        "cells": cells[filled].tolist(),
    }
