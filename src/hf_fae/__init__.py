"""hf_fae: representation tokenizers and generators for images, native to the Hugging Face libraries.

Importing the package registers its classes with diffusers (see `registration`), so that
`DiffusionPipeline.from_pretrained(repo)` finds them. Public names are imported on first access.
"""

import importlib

from . import registration


__version__ = "0.1.0"

# Public name -> the module that defines it.
_PUBLIC = {
    **registration.PUBLISHED,
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
