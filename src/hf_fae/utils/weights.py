"""What weights must be before a model computes with them: floating-point numbers, all finite."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn


__all__ = ["check_dtypes", "check_weights", "read_dtypes"]


def check_dtypes(model: nn.Module, dtypes: Mapping[str, str | torch.dtype], place: str) -> None:
    """Check that weights are floating-point numbers where the model has such.

    Loading would cast others without a word: whole numbers to what they may not mean, complex ones to their real part.

    Args:
        dtypes: name of a weight -> its dtype, of torch or as safetensors writes it.
        place: where they come from, for the message.

    Raises:
        ValueError: a tensor of whole or complex numbers or truth values.
    """
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name in floating & dtypes.keys():
        dtype = dtypes[name]
        if not (dtype.is_floating_point if isinstance(dtype, torch.dtype) else dtype.startswith(("F", "BF"))):
            raise ValueError(f"weight {name!r} at {place!r} must be floating point, got {dtype}")


def read_dtypes(path: str | Path) -> dict[str, str]:
    """Name -> dtype of the tensors of a safetensors file, by its header."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}


def check_weights(model: nn.Module, place: str) -> None:
    """Check that all weights of a model are finite, buffers such as latent statistics among them.

    Args:
        place: where they come from, for the message.

    Raises:
        ValueError: NaN or infinity.
    """
    for name, tensor in model.state_dict().items():
        # A sum costs no memory of the tensor's size; only where it overflows the elements are looked at.
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            if not torch.isfinite(tensor.sum(dtype=torch.float32)):
                count = int((~torch.isfinite(tensor.float())).sum())
                if count:
                    raise ValueError(
                        f"weight {name!r} at {place!r} must be finite, got {count} NaN or infinite values"
                    )
