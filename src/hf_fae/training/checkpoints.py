"""Checkpoint folders `checkpoint-<step>`: whole or not there at all, whenever the process is killed."""

import os
import re
import shutil
from pathlib import Path


__all__ = ["clear_leftovers", "commit_checkpoint", "find_checkpoint", "list_checkpoints", "remove_later"]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def find_checkpoint(output_dir: Path, wanted: str | None, fresh: bool = True) -> Path | None:
    """The checkpoint to go on from.

    Args:
        wanted: a checkpoint folder, `"latest"` for the newest of the run, or None for none.
        fresh: without a wanted checkpoint, insist that the run has none yet.

    Raises:
        ValueError: `wanted` is no checkpoint, or a fresh run would write among the checkpoints of another.
    """
    existing = list_checkpoints(output_dir)
    if wanted is None:
        if existing and fresh:
            raise ValueError(
                f"output_dir {str(output_dir)!r} holds {existing[-1].name}: pass resume_from_checkpoint='latest' "
                "to go on from there, or another output_dir"
            )
        return None
    if wanted == "latest":
        return existing[-1] if existing else None
    if not (Path(wanted) / "state.json").is_file():
        raise ValueError(f"resume_from_checkpoint {wanted!r} is not a checkpoint folder: it has no state.json")
    return Path(wanted)


def commit_checkpoint(partial: Path, limit: int | None) -> None:
    """Rename the complete `.checkpoint-<step>` to `checkpoint-<step>`; then delete the oldest beyond `limit`."""
    for path in [*partial.iterdir(), partial]:  # on the disk before the name says so and older ones are deleted
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    final = partial.with_name(partial.name.removeprefix("."))
    if final.exists():  # a resumed run passes a step for the second time
        _remove(final)
    partial.rename(final)
    for old in list_checkpoints(final.parent)[:-limit] if limit else []:
        _remove(old)


def remove_later(output_dir: Path, step: int) -> None:
    """Delete the checkpoints after `step`: a run that went back to it takes another way from there."""
    for path in list_checkpoints(output_dir):
        if int(path.name.removeprefix("checkpoint-")) > step:
            _remove(path)


def clear_leftovers(output_dir: Path) -> None:
    """Delete what a run left that was killed while it wrote or deleted a checkpoint."""
    for path in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(path)


def _remove(folder):
    """Delete a folder so that no half of it is ever seen under its name."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}-old")))
