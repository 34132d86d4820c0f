"""What weights must be before a model computes with them: floating-point numbers, all finite."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn


__all__ = ["check_dtypes", "check_weights"]


def check_dtypes(path: str | Path, model: nn.Module) -> None:
    """Check that a safetensors file has floating-point numbers where the model has. Only its header is read.

    Loading would cast others without a word: whole numbers to what they may not mean, complex ones to their real part.

    Raises:
        ValueError: a tensor of whole or complex numbers or truth values.
    """
    floating = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            if name in floating and not (dtype := file.get_slice(name).get_dtype()).startswith(("F", "BF")):
                raise ValueError(f"weight {name!r} in {str(path)!r} must be floating point, got {dtype}")


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
