"""Bounds on the numbers of a config, checked before anything is built.

A config comes with a download. A layer count of 10^9 in it would keep a machine busy for days, and a grid of 10^6
tokens a side would fill its memory, long before the weights turn out not to fit. Every bound lies far above all
published models.
"""

import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any


__all__ = ["check_config", "check_numbers"]

# Ending of a key -> smallest and largest number. The first ending that fits counts; of a list, also the sum.
BOUNDS = {
    "layers": (0, 1024),
    "heads": (1, 1024),
    "head_dim": (1, 4096),
    "hidden_size": (1, 2**16),
    "feature_dim": (1, 2**16),
    "intermediate_size": (1, 2**18),
    "channels": (1, 2**16),
    "sample_size": (1, 2**14),
    "image_size": (1, 2**14),
    "patch_size": (1, 2**14),
    "train_timesteps": (1, 10**6),
    "latent_tokens": (1, 2**16),
    "buffer_tokens": (0, 2**16),
    "caption_length": (1, 2**16),
    "position_embeddings": (1, 2**20),
}
LARGEST = 2**27  # of any other whole number, such as the size of a vocabulary
MAX_TOKENS = 2**18  # of the grid that `sample_size` and `patch_size` make


def check_config(model_class: type, config: Mapping[str, Any]) -> None:
    """Refuse a config that is not of the types that `model_class.__init__` names, or out of bounds.

    Args:
        config: arguments of `model_class`; other keys pass.

    Raises:
        ValueError: a value of another type, a number out of bounds or not finite, or too many tokens.
    """
    parameters = inspect.signature(model_class.__init__).parameters
    place = f"the config of {model_class.__name__}"
    for name, value in config.items():
        if name in parameters and not _fits(value, parameters[name].annotation):
            wanted = inspect.formatannotation(parameters[name].annotation)
            raise ValueError(f"{name} in {place} must be {wanted}, got {_shorten(value)}")
    check_numbers(config, place)


def check_numbers(config: Mapping[str, Any], place: str) -> None:
    """Refuse numbers out of bounds anywhere in a config, with those of nested dicts and lists.

    Args:
        place: what the config is, for messages.

    Raises:
        ValueError: a number out of bounds or not finite, or too many tokens.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_numbers(value, place)
        elif isinstance(value, (list, tuple)):
            numbers = [item for item in value if isinstance(item, Real)]
            for number in numbers:
                _check_number(name, number, place)
            if name.endswith("layers") and numbers:
                _check_number(name, sum(numbers), place)
        elif isinstance(value, Real):
            _check_number(name, value, place)
    size, patch = config.get("sample_size"), config.get("patch_size")
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    if isinstance(patch, int) and all(isinstance(side, int) for side in sides):
        tokens = math.prod(sides) // patch**2
        if tokens > MAX_TOKENS:
            raise ValueError(
                f"sample_size / patch_size in {place} must give at most {MAX_TOKENS} tokens, got {tokens}"
            )


def _check_number(name: str, number: Real, place: str) -> None:
    if isinstance(number, bool):
        return
    if not math.isfinite(number):
        raise ValueError(f"{name} in {place} must be finite, got {number}")
    for ending, (low, high) in BOUNDS.items():
        if name.endswith(ending):
            if not low <= number <= high:
                raise ValueError(f"{name} in {place} must be from {low} to {high}, got {number}")
            return
    if abs(number) > LARGEST and isinstance(number, Integral):
        raise ValueError(f"{name} in {place} must be at most {LARGEST}, got {number}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value has an annotated type. Whole numbers pass for real ones, lists for tuples and the reverse."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(annotation))
    kind, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in (list, tuple):
        items = [argument for argument in arguments if argument is not Ellipsis]
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
        return is_sequence and (not items or all(_fits(item, items[0]) for item in value))
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is dict:
        return isinstance(value, Mapping)
    return kind not in (bool, str, type(None), types.NoneType) or isinstance(value, kind or types.NoneType)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
