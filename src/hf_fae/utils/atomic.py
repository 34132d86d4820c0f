"""Files that are complete at any moment, whenever the process is killed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


__all__ = ["atomic_path", "atomic_write", "flush"]


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end: readers see the old file or the new one, never a part.

    After an error the old file is still there, and the part is removed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        flush(part)  # else a power failure may leave an empty file under the name
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Write a text file under another name, then rename it, see `atomic_path`."""
    with atomic_path(path) as part:
        part.write_text(text)


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
