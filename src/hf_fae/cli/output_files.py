"""Where `hf-fae generate` writes: one file with a grid, or a file for each image by a pattern."""

import argparse
import re
import string
from pathlib import Path

from .argument_types import image_file


__all__ = ["file_names", "output", "writes_several"]

FIELDS = ("name", "seed", "index")
IN_FOLDER = "{name}-{seed}.png"


def output(text: str) -> Path:
    """A file, a pattern with `{name}`, `{seed}` or `{index}`, or a folder, which stands for a pattern in it."""
    path = Path(text)
    if path.is_dir() or text.endswith("/") or not path.suffix:
        if path.exists() and not path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is no folder; a file must end in .png, .webp, .jpg or .jpeg")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"is in the folder {str(path.parent)!r}, which does not exist")
        return path / IN_FOLDER
    try:
        parts = list(string.Formatter().parse(path.name))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no pattern: {error}") from error
    if any(field is not None and (field not in FIELDS or spec or how) for _, field, spec, how in parts):
        raise argparse.ArgumentTypeError(f"may have {{name}}, {{seed}} and {{index}} alone, got {text!r}")
    return image_file(text)


def writes_several(path: Path) -> bool:
    """Whether it is a pattern."""
    return "{" in path.name


def file_names(path: Path, names: list[str], seeds: list[int]) -> list[Path]:
    """A file for each image.

    Raises:
        ValueError: two images would have one file.
    """
    if not writes_several(path):
        if len(names) > 1:
            raise ValueError(
                f"--output must be a folder or have {{name}}, {{seed}} or {{index}} in its name for {len(names)} "
                f"images without a grid, got {str(path)!r}"
            )
        return [path]
    files = [
        path.with_name(path.name.format(name=_slug(name), seed=seed, index=index))
        for index, (name, seed) in enumerate(zip(names, seeds, strict=True))
    ]
    if len(set(files)) < len(files):
        raise ValueError(f"--output {str(path)!r} names several of {len(files)} images alike: add {{seed}}")
    return files


def _slug(name):
    return re.sub(r"[^\w-]+", "-", name.lower())[:60].strip("-") or "image"
