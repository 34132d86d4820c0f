"""Files that are complete at any moment, whenever the process is killed."""

import os
from pathlib import Path


__all__ = ["atomic_write", "flush"]


def atomic_write(path: Path, text: str) -> None:
    """Write a text file under another name, then rename it: readers see the old text or the new one, never a part."""
    part = path.with_suffix(".part")
    part.write_text(text)
    flush(part)  # else a power failure may leave an empty file under the name
    part.replace(path)


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
