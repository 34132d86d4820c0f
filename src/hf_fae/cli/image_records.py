"""Images written with the settings that repeat them, as PNG text or, in WebP and JPEG, as EXIF description."""

import json
from pathlib import Path
from typing import Any

from ..utils.atomic import atomic_path


__all__ = ["ENDINGS", "check_record", "read_record", "write_image"]

# Ending -> Pillow's format and options.
ENDINGS = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"quality": 90}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
}
KEY = "hf_fae"  # of the PNG text, and the version within a record
MAX_RECORD = {"JPEG": 60_000}  # characters: an EXIF block of JPEG has 64 kB
MAX_TEXT = 900_000  # Pillow reads no longer PNG text
DESCRIPTION = 0x010E  # EXIF's ImageDescription


def check_record(record: dict[str, Any], path: Path) -> None:
    """Know before anything is computed that the file can hold the settings.

    Raises:
        ValueError: they are too long.
    """
    kind, _ = ENDINGS[path.suffix.lower()]
    length, limit = len(json.dumps(record)), MAX_RECORD.get(kind, MAX_TEXT)
    if length > limit:
        raise ValueError(f"--output {str(path)!r} can hold {limit} characters of settings, but these have {length}")


def write_image(image, path: Path, record: dict[str, Any] | None = None) -> None:
    """Write a PIL image in the format of its ending; a write that fails leaves an older file as it was.

    Args:
        record: settings to store with it, for `read_record`.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    kind, options = ENDINGS[path.suffix.lower()]
    if record is not None:
        text = json.dumps(record)
        if kind == "PNG":
            options = {**options, "pnginfo": PngInfo()}
            options["pnginfo"].add_text(KEY, text)
        else:
            options = {**options, "exif": Image.Exif()}
            options["exif"][DESCRIPTION] = text
    with atomic_path(path) as part:
        image.save(part, format=kind, **options)


def read_record(path: str) -> dict[str, Any]:
    """The settings that `write_image` stored.

    Raises:
        ValueError: the file cannot be read, or has none.
    """
    from PIL import Image

    from ..data.image_files import open_regular

    try:
        with open_regular(path) as file, Image.open(file, formats=("PNG", "WEBP", "JPEG")) as image:
            text = image.info.get(KEY) if image.format == "PNG" else image.getexif().get(DESCRIPTION)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"--from {path!r} cannot be read: {error}") from error
    try:
        record = json.loads(text or "")
    except (TypeError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or KEY not in record:
        raise ValueError(f"--from {path!r} holds no settings of hf-fae generate")
    return record
