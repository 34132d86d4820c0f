"""The metrics of samples against a reference, each under the name of who judged."""

import torch

from .distances import GaussianStatistics, frechet_distance, inception_score, kernel_distance, precision_recall
from .extractors import FeatureExtractor, metric_name
from .parts import Parts
from .references import Reference


__all__ = ["METRICS", "score_samples"]

METRICS = ("fid", "sfid", "is", "kid", "precision", "recall")


def score_samples(
    samples: Parts, reference: Reference, extractor: FeatureExtractor, metrics: list[str]
) -> dict[str, float]:
    """Those of `METRICS` for which there is what they need: sFID needs Inception, IS logits, the last three pictures.

    Args:
        samples: with tensors "NAME.features", where there are any "NAME.logits" and "NAME.spatial".
        reference: computed for the same extractor.

    Returns:
        By names such as "fid", or "fid_NAME" where the judge is not Inception; with "is_std" and "kid_std", over parts
        and over subsets of the samples.
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
        pair = dict(zip(("precision", "recall"), precision_recall(samples, reference), strict=True))
        found |= {name: value for name, value in pair.items() if name in metrics}
    return found
