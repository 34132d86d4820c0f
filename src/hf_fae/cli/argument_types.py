"""Argument types of argparse, checked before any model is loaded, and the arguments that commands share."""

import argparse
import os
from pathlib import Path

import torch

from ..evaluation.options import DTYPES


__all__ = ["TEXT_ENCODER_HELP", "add_model_arguments", "positive"]

TEXT_ENCODER_HELP = "the text encoder, for pipelines that read text and were saved without it"


def add_model_arguments(parser: argparse.ArgumentParser, help: str) -> None:
    """`--model`, described by `help`, and where and in which precision it computes; `--output` for a PNG."""
    default = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help=help)
    parser.add_argument("--output", required=True, type=png, metavar="PNG", help="where to write the image")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision (default: float32)")
    parser.add_argument("--device", type=device, default=default, help="where to compute (default here: %(default)s)")


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """A device that torch can use on this machine."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error


def png(text: str) -> Path:
    """A PNG file that can be written."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"is in the folder {str(path.parent)!r}, which does not exist")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path
