"""What an image of `hf-fae generate` depends on: as flags, and as the record that is stored with it."""

import argparse
import math
from typing import Any

from .. import __version__
from ..evaluation.options import DTYPES
from .argument_types import TEXT_ENCODER_HELP, device, positive, seed


__all__ = ["add_settings", "make_record", "resolve_settings"]

CONDITIONS = ("class", "prompt")
# Flag -> how argparse reads it. A flag that is not given is absent: it may come from a record.
SETTINGS = {
    "model": {"metavar": "PATH_OR_ID", "help": "folder or Hub id of a pipeline"},
    "revision": {"metavar": "NAME", "help": "branch, tag or commit of a Hub id (default: main)"},
    "lora": {"metavar": "PATH_OR_ID", "help": "LoRA of the pipeline; its new classes can be generated"},
    "lora-scale": {"type": float, "metavar": "SCALE", "help": "strength of the LoRA (default: 1)"},
    "text-encoder": {"metavar": "PATH_OR_ID", "help": TEXT_ENCODER_HELP},
    "class": {"nargs": "+", "metavar": "NAME_OR_ID", "help": "classes to generate"},
    "prompt": {"nargs": "+", "metavar": "TEXT", "help": "texts to generate from, each in quotation marks"},
    "negative-class": {
        "nargs": "+",
        "metavar": "NAME_OR_ID",
        "help": "guide away from this class (one, or one for each) instead of from no class",
    },
    "negative-prompt": {
        "nargs": "+",
        "metavar": "TEXT",
        "help": "guide away from this text (one, or one for each) instead of from the empty text",
    },
    "num-images-per-prompt": {"type": positive, "metavar": "N", "help": "samples per class or text (default: 1)"},
    "num-inference-steps": {"type": positive, "metavar": "N", "help": "default: the pipeline's own"},
    "guidance-scale": {"type": float, "metavar": "SCALE", "help": "default: the pipeline's own"},
    "seed": {"type": seed, "metavar": "N", "help": "of the first image; +1 for each further one (default: 0)"},
    "dtype": {"choices": DTYPES, "help": "precision (default: float32)"},
    "device": {"type": device, "help": "where to compute (default: an accelerator)"},
}
DEFAULTS = {"num-images-per-prompt": 1, "seed": 0, "dtype": "float32", "lora-scale": 1.0}
# A flag beside `--from` replaces these settings of the record, too.
REPLACED = {"model": ["revision"], "lora": ["lora-scale"], "class": ["prompt"], "prompt": ["class"]}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting."""
    either = parser.add_mutually_exclusive_group()
    for name, options in SETTINGS.items():
        place = either if name in CONDITIONS else parser
        place.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, **options)


def resolve_settings(args: argparse.Namespace, record: dict[str, Any], source: str | None) -> dict[str, Any]:
    """The settings of a command line: its flags, before those of the `record` of image `source`, before defaults.

    Raises:
        ValueError: one is missing or does not fit.
    """
    given = {name: value for name, value in vars(args).items() if name in SETTINGS}
    replaced = {name for flag in given for name in (flag, *REPLACED.get(flag, []))}
    kept = [name for name in SETTINGS if name in record and name not in replaced]
    settings = {**DEFAULTS, **{name: _read(name, record[name], source) for name in kept}, **given}
    if "model" not in settings:
        raise ValueError("one of the arguments --model --from is required")
    if sum(name in settings for name in CONDITIONS) != 1:
        raise ValueError("one of the arguments --class --prompt is required")
    if not math.isfinite(settings["lora-scale"]):
        raise ValueError(f"--lora-scale must be finite, got {settings['lora-scale']}")
    if "lora-scale" in given and "lora" not in settings:
        raise ValueError(f"--lora-scale has no meaning without --lora, got {given['lora-scale']}")
    if "device" not in settings:
        settings["device"] = device("auto")
    return settings


def make_record(settings: dict[str, Any], grid: bool, **changed: Any) -> dict[str, Any]:
    """What to store with an image: JSON of all settings, with `changed` ones (underscores for dashes)."""
    changed = {name.replace("_", "-"): value for name, value in changed.items()}
    record = {**settings, **changed, "device": settings["device"].type}
    if "lora" not in record:
        del record["lora-scale"]
    return {"hf_fae": __version__, "grid": grid, **{name: record[name] for name in SETTINGS if name in record}}


def _read(name, value, source):
    """A value of a record by the rules of its flag."""
    options = SETTINGS[name]
    values = value if isinstance(value, list) and "nargs" in options else [value]
    try:
        if not values or not all(isinstance(item, (str, int, float)) for item in values):
            raise ValueError(f"got {value!r}")
        values = [options.get("type", str)(str(item)) for item in values]
        if "choices" in options and values[0] not in options["choices"]:
            raise ValueError(f"got {value!r}")
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"--from {source!r} has an unusable --{name}, which may be given instead: {error}") from error
    return values if "nargs" in options else values[0]
