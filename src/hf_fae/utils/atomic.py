"""Files that are complete at any moment, whenever the process is killed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


__all__ = ["atomic_path", "atomic_write"]


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end: readers see the old file or the new one, never a part.

    After an error the old file is still there, and the part is removed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Write a text file under another name, then rename it, as `atomic_path`."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
