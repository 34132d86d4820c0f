"""The metrics of samples against a reference, each named after its feature extractor."""

import torch

from ..inputs.extractors import FeatureExtractor, metric_name
from ..inputs.references import Reference
from ..metrics.distances import (
    GaussianStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from ..resumable import Parts


__all__ = ["METRICS", "check_metrics", "score_samples"]

# Metric -> the extractor output that it compares, and whether it needs the images of the reference.
METRICS = {
    "fid": ("features", False),
    "sfid": ("spatial", False),
    "is": ("logits", False),
    "kid": ("features", True),
    "precision": ("features", True),
    "recall": ("features", True),
}
NEIGHBOURS = 3  # of precision and recall


def check_metrics(metrics: list[str], extractors: list[FeatureExtractor], reference_count: int) -> None:
    """Check that at least one metric can be computed, from enough images.

    Args:
        reference_count: images of the reference; 0 if it has statistics alone.

    Raises:
        ValueError: no extractor has the outputs that a metric needs, or the reference has too few images.
    """
    outputs = {name for extractor in extractors for name in extractor.outputs}
    possible = {
        name
        for name in set(metrics) & set(METRICS)
        if METRICS[name][0] in outputs and (reference_count or not METRICS[name][1])
    }
    if not possible and set(metrics) <= set(METRICS):
        names = ", ".join(extractor.name for extractor in extractors)
        raise ValueError(
            f"metrics must have one that {names} can measure with this reference, got {', '.join(metrics)}"
        )
    if possible & {"precision", "recall"} and reference_count <= NEIGHBOURS:
        raise ValueError(f"reference must have more than {NEIGHBOURS} images, got {reference_count}")


def score_samples(
    samples: Parts, reference: Reference, extractor: FeatureExtractor, metrics: list[str]
) -> dict[str, float]:
    """The `METRICS` that can be computed: sFID needs Inception, IS logits, the last three the images of the reference.

    Args:
        samples: with tensors "NAME.features" and, depending on the extractor, "NAME.logits" and "NAME.spatial".
        reference: computed for the same extractor.

    Returns:
        Under names such as "fid", or "fid_NAME" for other extractors than Inception; with "is_std" and "kid_std", the
        deviations over splits and subsets of the samples.
    """
    found, present = {}, samples.names()
    for metric, feature in (("fid", "features"), ("sfid", "spatial")):
        name = f"{extractor.name}.{feature}"
        known = reference.statistics(feature, extractor) if metric in metrics and name in present else None
        if known is not None:
            found[metric] = frechet_distance(GaussianStatistics.of(samples.iterate(name), "samples"), known)
    if "is" in metrics and f"{extractor.name}.logits" in present:
        found["is"], found["is_std"] = inception_score(samples.stack(f"{extractor.name}.logits"))
    if {"kid", "precision", "recall"} & set(metrics):
        found |= _compare_samples(samples.stack(f"{extractor.name}.features"), reference.features(extractor), metrics)
    return {metric_name(metric, extractor): value for metric, value in found.items()}


def _compare_samples(samples: torch.Tensor, reference: torch.Tensor | None, metrics: list[str]) -> dict[str, float]:
    found = {}
    if reference is not None and "kid" in metrics:
        found["kid"], found["kid_std"] = kernel_distance(samples, reference)
    if reference is not None and {"precision", "recall"} & set(metrics):
        pair = dict(zip(("precision", "recall"), precision_recall(samples, reference, NEIGHBOURS), strict=True))
        found |= {name: value for name, value in pair.items() if name in metrics}
    return found
