"""The six feature spaces of FDr6 and MIND6, as data.

FDr6 is that of the FD-loss paper (arXiv 2604.28190), as RAEv2's code (arXiv 2605.18324) measures it; MIND6 (arXiv
2605.06797) has the same spaces.
"""

from dataclasses import dataclass


__all__ = ["PANEL", "FeatureSpace", "panel_name"]


@dataclass(frozen=True)
class FeatureSpace:
    """A network of timm, and what is read of it.

    Attributes:
        path: Hub id; None for Inception, which has an extractor of its own.
        imagenet_distance: Fréchet distance of ImageNet's validation images to its training images at 256 px.
        size: side of its input, in pixels; None for the network's own.
        reads_maps: the spatial mean of the last feature maps, not what the classifier reads: a class token or the
            attention-pooled feature.
    """

    path: str | None
    imagenet_distance: float
    size: int | None = None
    reads_maps: bool = False


PANEL = {
    "inception": FeatureSpace(None, 1.68),
    "convnextv2-b": FeatureSpace("timm/convnextv2_base.fcmae_ft_in22k_in1k", 56.87, reads_maps=True),
    "dinov2-l": FeatureSpace("timm/vit_large_patch14_dinov2.lvd142m", 14.19, size=256),
    "mae-l": FeatureSpace("timm/vit_large_patch16_224.mae", 0.04),
    "siglip2-so400m": FeatureSpace("timm/vit_so400m_patch14_siglip_224.v2_webli", 0.60),
    "clip-l": FeatureSpace("timm/vit_large_patch14_clip_224.openai", 5.60, size=256),
}


def panel_name(metric: str, names: list[str]) -> str:
    """ "fdr6" of all six spaces; of other spaces these are named, as in "fdr_effnet+dinov2"."""
    return f"{metric}{len(PANEL)}" if set(names) == set(PANEL) else f"{metric}_{'+'.join(names)}"
