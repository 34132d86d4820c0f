"""The interface of `evaluate` that the modules in `hf_metrics/` share: their descriptions, and inputs as tensors."""

import torch

from ..images import from_uint8


__all__ = ["metric_info", "to_features", "to_images"]


def metric_info(
    description: str, citation: str, inputs: str, url: str, kind: str = "features", has_references: bool = True
):
    """The `evaluate.MetricInfo` of a module.

    Args:
        inputs: arguments and results of `compute`.
        url: of the paper.
        kind: what is compared: "features" (D,), "tokens" (N, C) or 8-bit "images" (H, W, 3).
    """
    import datasets
    import evaluate

    axes = {"features": 1, "tokens": 2, "images": 3}[kind]
    feature = datasets.Value("uint8" if kind == "images" else "float64")
    for _ in range(axes):
        feature = datasets.List(feature)
    names = ("predictions", "references") if has_references else ("predictions",)
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=inputs,
        features=datasets.Features(dict.fromkeys(names, feature)),
        reference_urls=[url],
    )


def to_features(*lists: list) -> list[torch.Tensor]:
    """Nested lists as fp64 tensors."""
    return [torch.tensor(values, dtype=torch.float64) for values in lists]


def to_images(*lists: list) -> list[torch.Tensor]:
    """Nested lists (B, H, W, 3) of 8-bit numbers as images (B, 3, H, W) in [-1, 1]."""
    return [from_uint8(torch.tensor(values).permute(0, 3, 1, 2)) for values in lists]
