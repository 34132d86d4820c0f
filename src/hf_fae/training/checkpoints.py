"""Checkpoint folders `checkpoint-<step>`: complete or absent whenever the process is killed, and known to be intact.

`checksums.json`, written last, has the digest of every other file.
"""

import contextlib
import json
import logging
import re
import shutil
from pathlib import Path

from ..utils.atomic import flush
from ..utils.digests import hash_file


__all__ = [
    "check_same_order",
    "clear_leftovers",
    "commit_checkpoint",
    "find_checkpoint",
    "find_damage",
    "list_checkpoints",
    "remove_later",
    "writing_checkpoint",
]

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; some may be corrupt."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def find_checkpoint(output_dir: Path, wanted: str | None, fresh: bool = True) -> Path | None:
    """The checkpoint to resume from.

    Args:
        wanted: a checkpoint folder, `"latest"` for the newest intact one of the run, or None for none. Newer ones that
            are corrupt are named in a warning.
        fresh: without a wanted checkpoint, require that the run has none yet.

    Raises:
        ValueError: `wanted` is no intact checkpoint, all of the run are corrupt, or a new run would mix its
            checkpoints with those of another.
    """
    existing = list_checkpoints(output_dir)
    if wanted is None:
        if existing and fresh:
            raise ValueError(
                f"output_dir {str(output_dir)!r} holds {existing[-1].name}: pass resume_from_checkpoint='latest' "
                "to resume from it, or another output_dir"
            )
        return None
    if wanted == "latest":
        return _newest_intact(output_dir, existing)
    if not (Path(wanted) / "state.json").is_file():
        raise ValueError(f"resume_from_checkpoint {wanted!r} is not a checkpoint folder: it has no state.json")
    if damage := find_damage(Path(wanted)):
        raise ValueError(f"resume_from_checkpoint {wanted!r} is corrupt, choose another checkpoint: {damage}")
    return Path(wanted)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file matches its digest."""
    try:
        digests = json.loads((checkpoint / CHECKSUMS).read_bytes())
        if not isinstance(digests, dict) or "state.json" not in digests:
            return f"{CHECKSUMS} is corrupt"
        for name, digest in digests.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if hash_file(checkpoint / name) != digest:
                return f"{name} does not match its digest"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except OSError as error:
        return f"a file cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return f"{CHECKSUMS} is corrupt"
    return None


def check_same_order(checkpoint: Path, before: dict, now: dict) -> None:
    """Refuse to resume with data in another order.

    Args:
        before, now: `TrainingData.signature` of the checkpoint and of this run.

    Raises:
        ValueError: naming what has changed.
    """
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"the data must come in the order of {str(checkpoint)!r}, but "
            + ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
        )


@contextlib.contextmanager
def writing_checkpoint(output_dir: Path, step: int, limit: int | None, is_main: bool):
    """A folder to write a checkpoint into; when the context ends without error it becomes `checkpoint-<step>`.

    Every process enters; the main one makes the folder and commits it. `limit` as in `commit_checkpoint`.
    """
    partial = output_dir / f".checkpoint-{step}"
    if is_main:
        partial.mkdir()
    yield partial
    if is_main:
        commit_checkpoint(partial, limit)


def commit_checkpoint(partial: Path, limit: int | None) -> None:
    """Write the digests of the complete `.checkpoint-<step>`, rename it to `checkpoint-<step>`, delete older ones.

    Args:
        limit: how many of the newest are kept; None keeps all.
    """
    digests = {path.name: hash_file(path) for path in sorted(partial.iterdir())}
    (partial / CHECKSUMS).write_text(json.dumps(digests, indent=1))
    for path in [*partial.iterdir(), partial]:  # on disk before it is renamed and older ones are deleted
        flush(path)
    final = partial.with_name(partial.name.removeprefix("."))
    if final.exists():  # a resumed run reaches a step for the second time
        _remove(final)
    partial.rename(final)
    for old in list_checkpoints(final.parent)[:-limit] if limit else []:
        _remove(old)


def remove_later(output_dir: Path, step: int) -> None:
    """Delete the checkpoints after `step`: a run resumed there diverges from them."""
    for path in list_checkpoints(output_dir):
        if int(path.name.removeprefix("checkpoint-")) > step:
            _remove(path)


def clear_leftovers(output_dir: Path) -> None:
    """Delete what a run left behind when it was killed while writing or deleting a checkpoint."""
    for path in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(path)


def _newest_intact(output_dir, existing):
    skipped = []
    for path in reversed(existing):
        damage = find_damage(path)
        if damage is None:
            if skipped:
                logger.warning("resuming from %s, as newer ones are corrupt: %s", path.name, "; ".join(skipped))
            return path
        skipped.append(f"{path.name} ({damage})")
    if skipped:
        raise ValueError(
            f"output_dir {str(output_dir)!r} has no intact checkpoint to resume from: {'; '.join(skipped)}; delete "
            "them to start again, or pass another output_dir"
        )
    return None


def _remove(folder):
    """Delete a folder so that its name never refers to a part of it."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}-old")))
