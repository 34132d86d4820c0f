"""SHA-256 digests of files, by which corrupt files are told from intact ones."""

import hashlib
import os
from pathlib import Path

from .atomic import flush


__all__ = ["commit_with_digest", "find_damage", "hash_file"]


def hash_file(path: str | Path) -> str:
    """The SHA-256 digest of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def commit_with_digest(part: Path, path: Path) -> None:
    """Rename a complete file `part` to `path`, after its digest was written next to it into `<path>.sha256`."""
    flush(part)
    digest = _digest_file(path)
    temporary = digest.with_name(f"{digest.name}.part")
    temporary.write_text(hash_file(part) + "\n")
    temporary.replace(digest)
    part.replace(path)


def find_damage(path: Path, require_digest: bool = True) -> str | None:
    """What is wrong with a file of `commit_with_digest`, in a few words; None if it is intact.

    Args:
        require_digest: whether a file without digest, as former versions wrote them, counts as corrupt.
    """
    try:
        expected = _digest_file(path).read_text(errors="replace").strip() if _digest_file(path).exists() else None
        if not path.is_file():
            return f"{path.name} is missing"
        if expected is None:
            return f"{path.name} has no digest" if require_digest else None
        return None if hash_file(path) == expected else f"{path.name} does not match its digest"
    except OSError as error:
        return f"{path.name} cannot be read: {os.strerror(error.errno) if error.errno else error}"


def _digest_file(path):
    return path.with_name(f"{path.name}.sha256")
