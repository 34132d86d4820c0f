"""Folders that one run at a time may write to."""

from pathlib import Path

from filelock import FileLock, Timeout


__all__ = ["lock_folder"]

LOCK = ".lock"

# A killed run's data workers notice its end within five seconds; until then they hold its lock.
PATIENCE = 10


def lock_folder(folder: str | Path, argument: str = "output_dir") -> FileLock:
    """Lock an existing folder until the lock is released or the process ends, however it ends.

    Raises:
        ValueError: another process has locked the folder, or it cannot be written; the message names `argument`.
    """
    lock = FileLock(Path(folder, LOCK))
    try:
        lock.acquire(timeout=PATIENCE, poll_interval=0.2)
    except Timeout as error:
        raise ValueError(
            f"{argument} {str(folder)!r} is in use by another run: wait for its end, or pass another {argument}"
        ) from error
    except OSError as error:
        raise ValueError(f"{argument} {str(folder)!r} cannot be written: {error.strerror or error}") from error
    return lock
