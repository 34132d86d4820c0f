"""Registration with diffusers: one table entry and a few names make it find our classes, whichever is imported first.

diffusers resolves a pipeline's components through the table `LOADABLE_CLASSES`, and pipeline classes through its own
namespace. With both filled in, components are recorded as `["hf_fae", "AutoencoderFAE"]` (files are free to move) and
folders, Hub ids, `DiffusionPipeline.from_pretrained` and `AutoModel.from_pretrained` all work after `import hf_fae`.

diffusers takes seconds to import, so `import hf_fae` does not: an import hook adds to its modules when, and if, they
are imported.
"""

import importlib
import importlib.abc
import sys


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
    """Register hf_fae with diffusers, now where it is imported already, else as soon as it is."""
    if _HOOK not in sys.meta_path:
        sys.meta_path.insert(0, _HOOK)
    for name, add in _ADDITIONS.items():
        if name in sys.modules:
            add(importlib.import_module(name))  # waits if another thread is in the middle of importing it


def _add_names(diffusers):
    """Our public classes as names of `diffusers`, imported on first access; names that it has itself stay its own."""
    ours = PUBLISHED.keys() - set(dir(diffusers))

    def __getattr__(name):  # PEP 562; diffusers' own lazy names are looked up when this one fails
        if name in ours:
            return getattr(importlib.import_module("hf_fae"), name)
        raise AttributeError(f"module 'diffusers' has no attribute {name!r}")

    diffusers.__getattr__ = __getattr__


def _add_base_classes(loading_utils):
    """The table entry, from which diffusers knows how to save and load our components."""
    if not hasattr(loading_utils, "LOADABLE_CLASSES"):
        raise ImportError("hf_fae extends the loader of diffusers >= 0.40 and < 0.43; found another release")
    methods = {base: ["save_pretrained", "from_pretrained"] for base in BASE_CLASSES}
    loading_utils.LOADABLE_CLASSES.setdefault("hf_fae", methods)


_ADDITIONS = {"diffusers": _add_names, "diffusers.pipelines.pipeline_loading_utils": _add_base_classes}


class _ImportHook(importlib.abc.MetaPathFinder):
    """Finds the modules of `_ADDITIONS` as all other finders do, and has them added to once they are executed."""

    def find_spec(self, name, path, target=None):
        if name not in _ADDITIONS:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _ADDITIONS[name](sys.modules[name])  # diffusers replaces its module there

            spec.loader.exec_module = exec_module
        return spec


_HOOK = _ImportHook()
