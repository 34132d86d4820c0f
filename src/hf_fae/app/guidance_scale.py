"""One slider for every kind of guidance: the scale that a pipeline uses by default, and another one in its place."""

import dataclasses

from ..guidance import FlowGuidance, Guidance, TokenGuidance
from ..pipelines.latent_pipeline import LatentPipeline


__all__ = ["default_guidance", "scale_of", "with_scale"]


def default_guidance(pipe: LatentPipeline) -> Guidance | FlowGuidance | TokenGuidance:
    """The guidance that a pipeline was saved with."""
    return type(pipe.guidance).of(pipe.config.guidance_scale)


def scale_of(guidance: Guidance | FlowGuidance | TokenGuidance) -> float:
    """The scale of a guidance; of a schedule the largest."""
    if isinstance(guidance, FlowGuidance):
        return 1 + guidance.weight
    if isinstance(guidance, TokenGuidance):
        return guidance.scale
    return max((scale for _, _, scale in guidance.intervals), default=1.0)


def with_scale(
    guidance: Guidance | FlowGuidance | TokenGuidance, scale: float
) -> Guidance | FlowGuidance | TokenGuidance:
    """The same guidance with another scale at all times; with its own scale it is unchanged."""
    if scale == scale_of(guidance):
        return guidance
    if isinstance(guidance, FlowGuidance):
        return dataclasses.replace(guidance, weight=scale - 1)
    if isinstance(guidance, TokenGuidance):
        return dataclasses.replace(guidance, scale=scale)
    return dataclasses.replace(guidance, intervals=Guidance.of(scale).intervals)
