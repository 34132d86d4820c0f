"""What the modules in `metrics/` share: how `evaluate` is told of their inputs, and tensors of these."""

import torch

from ..images import from_uint8


__all__ = ["metric_info", "to_features", "to_images"]


def metric_info(
    description: str, citation: str, inputs: str, url: str, kind: str = "features", has_references: bool = True
):
    """`evaluate.MetricInfo` of a module.

    Args:
        inputs: what `compute` takes and returns.
        url: of the paper.
        kind: of what is compared: "features" (D,), "tokens" (N, C) or 8-bit "pictures" (H, W, 3).
    """
    import datasets
    import evaluate

    axes = {"features": 1, "tokens": 2, "pictures": 3}[kind]
    feature = datasets.Value("uint8" if kind == "pictures" else "float64")
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
    """fp64 tensors of nested lists."""
    return [torch.tensor(values, dtype=torch.float64) for values in lists]


def to_images(*lists: list) -> list[torch.Tensor]:
    """Images (B, 3, H, W) in [-1, 1] of nested lists (B, H, W, 3) of 8-bit numbers."""
    return [from_uint8(torch.tensor(values).permute(0, 3, 1, 2)) for values in lists]
