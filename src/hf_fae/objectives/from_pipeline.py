"""The objective of a pipeline's generator."""

from diffusers import DDPMScheduler
from torch import nn

from ..generators.mar import MARTransformer2DModel
from ..pipelines.fae_mar import FAEMARPipeline
from ..pipelines.fae_starflow import FAEStarFlowPipeline
from ..pipelines.latent_pipeline import LatentPipeline
from .ddpm import DiffusionObjective
from .flow_matching import FlowMatchingObjective
from .generator import GeneratorObjective
from .mean_flow import MeanFlowObjective, TimePairs
from .starflow import STARFlowObjective
from .token_diffusion import AutoregressiveObjective, MARObjective


__all__ = ["objective_of"]


def objective_of(
    pipeline: LatentPipeline, condition: nn.Module, label_dropout: float, base_weight: float = 1.0, **flow_matching
) -> GeneratorObjective:
    """The objective that trains a pipeline's generator, with the settings saved with the pipeline.

    Args:
        condition, label_dropout, base_weight: as in `GeneratorObjective`.
        flow_matching: further arguments of `FlowMatchingObjective`, for a pipeline with such a scheduler.
    """
    models, common = (pipeline.transformer, pipeline.vae), {"label_dropout": label_dropout, "condition": condition}
    if isinstance(pipeline, FAEStarFlowPipeline):
        return STARFlowObjective(*models, **common)
    if isinstance(pipeline, FAEMARPipeline):
        is_masked = isinstance(pipeline.transformer, MARTransformer2DModel)
        objective = MARObjective if is_masked else AutoregressiveObjective
        return objective(*models, scheduler=pipeline.scheduler, **common)
    # The scheduler's shift is 1 / s for the papers' s.
    shift = 1 / pipeline.scheduler.config.get("shift", 1.0)
    if pipeline.transformer.config.get("use_meanflow"):
        return MeanFlowObjective(*models, times=TimePairs(shift=shift), **common)
    common["base_weight"] = base_weight
    if isinstance(pipeline.scheduler, DDPMScheduler):
        return DiffusionObjective(*models, scheduler=pipeline.scheduler, **common)
    return FlowMatchingObjective(*models, shift=shift, **common, **flow_matching)
