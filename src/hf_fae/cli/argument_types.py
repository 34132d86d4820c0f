"""Argument types of argparse, checked before any model is loaded."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .image_records import ENDINGS


if TYPE_CHECKING:
    import torch


__all__ = ["TEXT_ENCODER_HELP", "check_limits", "device", "image_file", "port", "positive", "seed"]

# Bounds that `--no-limits` lifts: more of these is a slip of the keyboard rather than a wish.
MAX_STEPS, MAX_IMAGES = 10_000, 1_000
TEXT_ENCODER_HELP = "the text encoder, for pipelines that read text and were saved without it"


def positive(text: str) -> int:
    """A positive integer."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 18) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def port(text: str) -> int:
    """A port of TCP."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"must be from 1 to 65535, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A seed of torch, with room for those that count on from it."""
    try:
        number = int(text) if len(text) <= 20 else 2**63
    except ValueError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from -2^63 to 2^63 - 1, got {text!r}")
    return number


def check_limits(steps: int | None, images: int, no_limits: bool) -> None:
    """Refuse more steps or images than anyone means.

    Raises:
        ValueError: too many, without `no_limits`.
    """
    if no_limits:
        return
    for flag, number, limit in (
        ("--num-inference-steps", steps or 0, MAX_STEPS),
        ("--num-images-per-prompt times the classes or texts", images, MAX_IMAGES),
    ):
        if number > limit:
            raise ValueError(f"{flag} must be at most {limit} without --no-limits, got {number}")


def device(text: str) -> "torch.device":
    """A device that torch can use on this machine; `auto` is the accelerator if there is one."""
    import torch

    if text == "auto":
        text = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        if torch.device(text).type == "meta":
            raise RuntimeError("it holds no values")
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error


def image_file(text: str) -> Path:
    """A PNG, WebP or JPEG file that can be written."""
    path = Path(text)
    if path.suffix.lower() not in ENDINGS:
        raise argparse.ArgumentTypeError(f"must end in .png, .webp, .jpg or .jpeg, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"is in the folder {str(path.parent)!r}, which does not exist")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path
