"""Registration with diffusers: one table entry and a few attributes make it find our classes.

diffusers resolves a pipeline's components through the table `LOADABLE_CLASSES`, and pipeline classes through its own
namespace. With both filled in, components are recorded as `["hf_fae", "AutoencoderFAE"]` (files are free to move) and
folders, Hub ids, `DiffusionPipeline.from_pretrained` and `AutoModel.from_pretrained` all work after `import hf_fae`.
"""

import importlib

import diffusers


__all__ = ["BASE_CLASSES", "PUBLISHED", "register"]

# diffusers looks up a component's base class, and with it how to save and load it, in the library's own namespace.
BASE_CLASSES = {
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "DiffusionPipeline": "diffusers",
}

# Components and pipelines: recorded in checkpoints by these names, which therefore never change.
PUBLISHED = {
    "AutoencoderDRoRAE": "hf_fae.autoencoders.drorae",
    "AutoencoderDeTok": "hf_fae.autoencoders.detok",
    "AutoencoderFAE": "hf_fae.autoencoders.fae",
    "AutoencoderMAETok": "hf_fae.autoencoders.maetok",
    "AutoencoderRAEv2": "hf_fae.autoencoders.raev2",
    "AutoregressiveTransformer2DModel": "hf_fae.generators.autoregressive",
    "DiTDHTransformer2DModel": "hf_fae.generators.dit_dh",
    "FAEDiTPipeline": "hf_fae.pipelines.fae_dit",
    "FAEMARPipeline": "hf_fae.pipelines.fae_mar",
    "FAEStarFlowPipeline": "hf_fae.pipelines.fae_starflow",
    "FAETextToImagePipeline": "hf_fae.pipelines.fae_text_to_image",
    "FlowMatchEulerMaruyamaScheduler": "hf_fae.schedulers.euler_maruyama",
    "LightningDiTTransformer2DModel": "hf_fae.generators.lightning_dit",
    "MARTransformer2DModel": "hf_fae.generators.mar",
    "MMDiTTransformer2DModel": "hf_fae.generators.mmdit",
    "RAEv2Transformer2DModel": "hf_fae.generators.raev2",
    "STARFlowTransformer2DModel": "hf_fae.generators.starflow",
}


def register() -> None:
    """Register hf_fae with diffusers; names that diffusers already has are left alone.

    Raises:
        ImportError: this diffusers release has no table of loadable classes.
    """
    try:
        from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
    except ImportError as error:
        raise ImportError(
            f"hf_fae extends the loader of diffusers >= 0.40 and < 0.43; found diffusers {diffusers.__version__}"
        ) from error

    LOADABLE_CLASSES.setdefault("hf_fae", {base: ["save_pretrained", "from_pretrained"] for base in BASE_CLASSES})
    for name, module in PUBLISHED.items():
        if not hasattr(diffusers, name):
            setattr(diffusers, name, getattr(importlib.import_module(module), name))
