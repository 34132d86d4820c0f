"""How scripts and the `hf-fae` command end: user errors as one sentence on standard error, with exit code 2."""

import os
import re
import sys
from collections.abc import Callable


__all__ = ["describe_error", "run"]

TRACEBACK = "HF_FAE_TRACEBACK"


def run(main: Callable[[], None], name: str | None = None) -> None:
    """Run a script's `main`.

    Errors in arguments, files and data, and a lack of memory, become one sentence; set `HF_FAE_TRACEBACK=1` for their
    traceback. Ctrl-C exits with code 130.

    Args:
        name: of the program; default: the script's file name.
    """
    name = name or os.path.basename(sys.argv[0])
    try:
        main()
    except KeyboardInterrupt:
        _exit(130, name, "interrupted")
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError, RuntimeError) as error:
        # torch has a RuntimeError of its own for each allocator; others are ours to mend
        is_memory = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error))
        if os.environ.get(TRACEBACK) or (isinstance(error, RuntimeError) and not is_memory):
            raise
        _exit(2, name, f"error: {'not enough memory: ' * is_memory}{describe_error(error)}")


def describe_error(error: Exception) -> str:
    """One sentence about an error: the first one of its message, or which file is concerned and why."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{str(error.filename)!r}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[a-z)'\"][.!?])\s+(?=[A-Z])", text)[0]


def _exit(code, name, message):
    rank = os.environ.get("RANK")
    process = f" (process {rank})" if rank is not None else ""
    print(f"{name}{process}: {message}", file=sys.stderr)
    sys.exit(code)
