"""hf_fae: representation tokenizers and generators for images, native to the Hugging Face libraries.

Importing the package registers its classes with diffusers (see `registration`), so that
`DiffusionPipeline.from_pretrained(repo)` finds them. Public names are imported on first access.
"""

import importlib
from typing import TYPE_CHECKING

from . import registration


if TYPE_CHECKING:  # what `_PUBLIC` says, for type checkers and editors
    from .autoencoders.detok import AutoencoderDeTok as AutoencoderDeTok
    from .autoencoders.drorae import AutoencoderDRoRAE as AutoencoderDRoRAE
    from .autoencoders.fae import AutoencoderFAE as AutoencoderFAE
    from .autoencoders.maetok import AutoencoderMAETok as AutoencoderMAETok
    from .autoencoders.raev2 import AutoencoderRAEv2 as AutoencoderRAEv2
    from .convert.published import load_published as load_published
    from .encoders import VisionEncoder as VisionEncoder
    from .generators.autoregressive import AutoregressiveTransformer2DModel as AutoregressiveTransformer2DModel
    from .generators.dit_dh import DiTDHTransformer2DModel as DiTDHTransformer2DModel
    from .generators.lightning_dit import LightningDiTTransformer2DModel as LightningDiTTransformer2DModel
    from .generators.mar import MARTransformer2DModel as MARTransformer2DModel
    from .generators.mmdit import MMDiTTransformer2DModel as MMDiTTransformer2DModel
    from .generators.raev2 import RAEv2Transformer2DModel as RAEv2Transformer2DModel
    from .generators.starflow import STARFlowTransformer2DModel as STARFlowTransformer2DModel
    from .guidance import FlowGuidance as FlowGuidance
    from .guidance import Guidance as Guidance
    from .guidance import TokenGuidance as TokenGuidance
    from .pipelines.fae_dit import FAEDiTPipeline as FAEDiTPipeline
    from .pipelines.fae_mar import FAEMARPipeline as FAEMARPipeline
    from .pipelines.fae_starflow import FAEStarFlowPipeline as FAEStarFlowPipeline
    from .pipelines.fae_text_to_image import FAETextToImagePipeline as FAETextToImagePipeline
    from .presets import PRESETS as PRESETS
    from .presets import build_preset as build_preset
    from .schedulers.euler_maruyama import FlowMatchEulerMaruyamaScheduler as FlowMatchEulerMaruyamaScheduler
    from .visual_tokenizer import AutoVisualTokenizer as AutoVisualTokenizer


__version__ = "0.1.0"

# Public name -> the module that defines it.
_PUBLIC = {
    **registration.PUBLISHED,
    "AutoVisualTokenizer": "hf_fae.visual_tokenizer",
    "FlowGuidance": "hf_fae.guidance",
    "Guidance": "hf_fae.guidance",
    "PRESETS": "hf_fae.presets",
    "TokenGuidance": "hf_fae.guidance",
    "VisionEncoder": "hf_fae.encoders",
    "build_preset": "hf_fae.presets",
    "load_published": "hf_fae.convert.published",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name):
    module = _PUBLIC.get(name) or registration.BASE_CLASSES.get(name)
    if module is None:
        raise AttributeError(f"module 'hf_fae' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_PUBLIC})


registration.register()
