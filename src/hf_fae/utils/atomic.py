"""Files that are complete at any moment, whenever the process is killed."""

from pathlib import Path


__all__ = ["atomic_write"]


def atomic_write(path: Path, text: str) -> None:
    """Write a text file under another name, then rename it: readers see the old text or the new one, never a part."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
