"""FDr6 and MIND6: distances in several feature spaces at once, in units of the distance of real images.

FID alone can be optimised directly, without better images. Samples that are as close to the reference as held-out real
images have FDr6 = 1.
"""

from statistics import mean

from ..inputs.extractors import FeatureExtractor
from ..inputs.panel import PANEL, panel_name
from ..inputs.references import Reference
from ..metrics.distances import GaussianStatistics, frechet_distance, sliced_distance
from ..resumable import Parts


__all__ = ["PANEL_METRICS", "check_panel", "real_distances", "score_panel"]

PANEL_METRICS = ("fdr", "mind")
IMAGENET, IMAGENET_SIZE = "ILSVRC/imagenet-1k", 256  # where the distances of `PANEL` were measured


def check_panel(
    metrics: list[str], extractors: list[FeatureExtractor], held_out_count: int | None, dataset: str, resolution: int
) -> None:
    """Check that the real images to compare with are known.

    Args:
        held_out_count: number of held-out images; None without any.

    Raises:
        ValueError: FDr of another data set than ImageNet or in other spaces than `PANEL` without held-out images, MIND
            without any, or a single one.
    """
    asked = [metric for metric in PANEL_METRICS if metric in metrics]
    if held_out_count is None:
        names = {extractor.name for extractor in extractors}
        is_published = dataset == IMAGENET and resolution == IMAGENET_SIZE and names <= set(PANEL)
        unknown = [metric for metric in asked if metric == "mind" or not is_published]
        if unknown:
            raise ValueError(f"held_out_split must name real images to compare with for {unknown[0]}, got None")
    elif not asked:
        raise ValueError(f"held_out_split must be None without the metrics fdr and mind, got {', '.join(metrics)}")
    elif held_out_count < 2:
        raise ValueError(f"held_out_split must have at least 2 images, got {held_out_count}")


def score_panel(
    samples: Parts,
    reference: Reference,
    held_out: Reference | None,
    extractors: list[FeatureExtractor],
    metrics: list[str],
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """FDr and MIND of samples, and their parts in each feature space.

    FDr is the mean over the spaces of the Fréchet distance to the reference, divided by that of the held-out images,
    without any by that of `PANEL`. MIND is the mean of `sliced_distance` to the held-out images.

    Args:
        samples: with tensors "NAME.features".
        reference, held_out: computed for these extractors.

    Returns:
        {"fdr6": value, "mind6": value}, or named after other spaces; and {"fdr": {space: value}, ...} with the
        divisors as "real_distance".
    """
    parts = {}
    if "fdr" in metrics:
        parts["real_distance"] = real = real_distances(reference, held_out, extractors)
        parts["fdr"] = {
            extractor.name: _distance(samples.iterate(f"{extractor.name}.features"), reference, extractor)
            / real[extractor.name]
            for extractor in extractors
        }
    if "mind" in metrics:
        parts["mind"] = {
            extractor.name: sliced_distance(samples.stack(f"{extractor.name}.features"), held_out.features(extractor))
            for extractor in extractors
        }
    names = [extractor.name for extractor in extractors]
    found = {panel_name(metric, names): mean(parts[metric].values()) for metric in PANEL_METRICS if metric in parts}
    return found, parts


def real_distances(
    reference: Reference, held_out: Reference | None, extractors: list[FeatureExtractor]
) -> dict[str, float]:
    """Fréchet distance of held-out images to the reference in each space; without them that of `PANEL`."""
    if held_out is None:
        return {extractor.name: PANEL[extractor.name].imagenet_distance for extractor in extractors}
    return {
        extractor.name: _distance(held_out.parts.iterate(f"{extractor.name}.features"), reference, extractor)
        for extractor in extractors
    }


def _distance(features, reference, extractor):
    statistics = GaussianStatistics.of(features, "images")
    return frechet_distance(statistics, reference.statistics("features", extractor))
