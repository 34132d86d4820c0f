"""Published files and models from them: nothing that a file holds is ever run, and nothing is read before it is used.

Weights are mapped into memory rather than copied, and a model is built around them on the meta device: loading costs
the pages that are looked at. A file must not change while a model of it is in use.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from ..utils.weights import check_dtypes


__all__ = ["build", "cast", "read_pickled_tensors", "read_weights"]

WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
# What trainings leave next to their weights. Such an object becomes an `_Inert` one; any other is refused.
SETTINGS = (
    "argparse.Namespace",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    "collections.",
    "lightning.",
    "numpy.",
    "omegaconf.",
    "pytorch_lightning.",
    "typing.",
)


class _Inert:
    """Stands for an object of a class or function that is never imported: accepts what a pickle does to it."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_weights(path: str | Path, ema: tuple[str, ...] = ("ema",)) -> dict[str, torch.Tensor]:
    """The state dict in a published file: safetensors, or what `torch.save` writes (zip or older format).

    A training checkpoint nests it: the entry of the first name in `ema` is taken, else `state_dict`, else the file
    itself. Prefixes of wrappers (`module.`, `_orig_mod.`) are removed.

    Args:
        path: the file; unless it is in torch's older format, tensors are mapped from it.
        ema: entries of averaged weights. A file that has `model` and none of them is refused, because raw weights are
            not what is published; with `()`, `model` is taken.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, no checkpoint, holds objects other than tensors and settings, or lacks
            the weights that are asked for.
    """
    path = Path(path)
    content = _read(path)
    nested = {name: value for name, value in content.items() if isinstance(value, Mapping)}
    names = [name for name in (*ema, "state_dict") if name in nested]
    if not names and "model" in nested:
        if ema:
            raise ValueError(f"{path} must hold averaged weights under {ema[0]!r}, got {_some(content)}")
        names = ["model"]
    state = nested[names[0]] if names else content
    weights = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} must hold a state dict of tensors, got {key!r}: {type(value).__name__}")
        while key.startswith(WRAPPERS):
            key = key.partition(".")[2]
        weights[key] = value.detach()
    if not weights:
        raise ValueError(f"{path} must hold weights, got none")
    return weights


def _read(path: Path) -> Mapping:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file of weights, but there is none")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{path} must be a whole safetensors file, got one that is truncated or corrupt"
            ) from error
    is_zip = zipfile.is_zipfile(path)
    if not is_zip and path.open("rb").read(2) == b"PK":
        raise ValueError(f"{path} must be a whole checkpoint of torch, got one that is truncated")
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        settings = [(_Inert, name) for name in foreign if name.startswith(SETTINGS)]
        if len(settings) == len(foreign):
            with torch.serialization.safe_globals(settings):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} must be a checkpoint of torch that holds tensors, got another kind of file"
        ) from error
    if len(settings) < len(foreign):
        name = next(name for name in foreign if not name.startswith(SETTINGS))
        raise ValueError(f"{path} must hold tensors and settings alone, got an object of {name!r}")
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a state dict, got {type(content).__name__}")
    return content


def _some(names: Iterable) -> str:
    """Names as a message shows them: the first five."""
    names = list(map(repr, names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class _TensorUnpickler(pickle.Unpickler):
    """Admits tensors and containers; tensors of any device become ones of the CPU."""

    @staticmethod
    def _storage(content: bytes):
        # A storage within a plain pickle is a torch.save of its own, which a plain unpickler would load unrestricted.
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    @staticmethod
    def _tensor(storage, offset, size, stride, *_):
        return torch._utils._rebuild_tensor(storage, offset, size, stride)

    @staticmethod
    def _parameter(data, *_):
        return data

    def find_class(self, module, name):
        admitted = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch.Size": torch.Size,
            "torch.storage._load_from_bytes": self._storage,
        }
        if (value := admitted.get(f"{module}.{name}")) is None:
            raise pickle.UnpicklingError(f"an object of '{module}.{name}'")
        return value


def read_pickled_tensors(path: str | Path) -> object:
    """What a plain pickle holds, such as latent statistics: tensors in dicts, lists and tuples, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, no pickle, or holds objects of another kind, which are not made.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file of pickled tensors, but there is none")
    try:
        with path.open("rb") as file:
            return _TensorUnpickler(file).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{path} must be a whole pickle of tensors and containers alone, got {error}") from error


def cast(name: str, tensor: torch.Tensor, keep: Iterable[str], dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of a model in `dtype`, unless that is None, it is no floating point, or `keep` has a part of its name.

    `keep` is a class's `_keep_in_fp32_modules`.
    """
    if dtype is None or not tensor.is_floating_point() or not set(keep or ()).isdisjoint(name.split(".")):
        return tensor
    return tensor.to(dtype)


def build(
    model_class: type[nn.Module], config: dict, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> nn.Module:
    """A model in evaluation mode whose parameters and buffers are the tensors of `state`.

    Args:
        model_class: a diffusers model.
        config: its arguments.
        state: a tensor for each parameter and persistent buffer, nothing else. They are taken, not copied.
        dtype: of the floating-point weights, except those that the class keeps in fp32; by default as in `state`.

    Raises:
        ValueError: a weight is missing, of another shape, or one too many.
    """
    with init_empty_weights(include_buffers=False):  # tables that are computed, not saved, are real
        model = model_class(**config)
    wanted, name = model.state_dict(), model_class.__name__
    if missing := [key for key in wanted if key not in state]:
        raise ValueError(
            f"checkpoint must have the weight {missing[0]!r} of {name}, got none ({len(missing)} missing)"
        )
    if unknown := [key for key in state if key not in wanted]:
        raise ValueError(f"checkpoint must hold only weights of {name}, got {unknown[0]!r} ({len(unknown)} unknown)")
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            shape, got = tuple(value.shape), tuple(state[key].shape)
            raise ValueError(f"checkpoint must have {key!r} of shape {shape} for this {name}, got {got}")
    check_dtypes(model, {key: value.dtype for key, value in state.items()}, "the published checkpoint")
    keep = getattr(model_class, "_keep_in_fp32_modules", None)
    model.load_state_dict({key: cast(key, state[key], keep, dtype) for key in wanted}, assign=True)
    return model.eval()
