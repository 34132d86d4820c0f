"""Models of ours in the layout in which their family is published, for the reference code to load."""

import importlib
from pathlib import Path

import torch
from diffusers import AutoModel
from safetensors.torch import save_file

from ..loading import loading


__all__ = ["EXPORTS", "export_model"]

# Class -> the function that gives the published state dict of a model, and maybe one of statistics.
EXPORTS = {
    "AutoencoderDRoRAE": "rae:export_rae",
    "AutoencoderDeTok": "detok:export_detok",
    "AutoencoderKL": "autoencoder_kl:export_autoencoder_kl",
    "AutoencoderRAEv2": "rae:export_rae",
    "DiTDHTransformer2DModel": "dit_dh:export_dit_dh",
    "LightningDiTTransformer2DModel": "denoisers:export_denoiser",
    "RAEv2Transformer2DModel": "raev2_dit:export_raev2_dit",
}


def export_model(source: str | Path, path: str | Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Write the weights of a saved model as the reference code of its family loads them.

    Args:
        source: folder or Hub id of the model; of a pipeline, a component's folder.
        path: file to write, `.safetensors` or a file of `torch.save` (`.pt`, `.pth`). Where a family keeps statistics
            in a file of their own, that lies beside it: `model.stat.pt` of `model.pt`.
        dtype: of the weights written; by default fp32.

    Returns:
        The files.

    Raises:
        ValueError: no model can be loaded, its class has no published layout, or its config is beyond it.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"path must end in .pt, .pth or .safetensors, got {str(path)!r}")
    with loading("source", str(source)):
        model = AutoModel.from_pretrained(str(source), dtype=dtype or torch.float32)
    name = type(model).__name__
    if name not in EXPORTS:
        raise ValueError(f"source must be a model of {', '.join(EXPORTS)}, got a {name}")
    module, _, function = EXPORTS[name].partition(":")
    states = getattr(importlib.import_module(f"hf_fae.convert.{module}"), function)(model)
    states = states if isinstance(states, tuple) else (states,)
    paths = [path, path.with_suffix(f".stat{path.suffix}")][: len(states)]
    for file, state in zip(paths, states, strict=True):
        state = {key: tensor.contiguous() for key, tensor in state.items()}
        if file.suffix == ".safetensors":
            save_file(state, file, metadata={"format": "pt"})
        else:
            torch.save(state, file)
    return paths
