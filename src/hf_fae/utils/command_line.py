"""How scripts end: user errors as one sentence on standard error with exit code 2, as the `hf-fae` command does."""

import os
import re
import sys
from collections.abc import Callable


__all__ = ["describe_error", "run"]

TRACEBACK = "HF_FAE_TRACEBACK"


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`.

    Errors in arguments, files and data become one sentence; set `HF_FAE_TRACEBACK=1` for their traceback. Ctrl-C exits
    with code 130.
    """
    try:
        main()
    except KeyboardInterrupt:
        _exit(130, "interrupted before the first step: nothing to save")
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get(TRACEBACK):
            raise
        _exit(2, f"error: {describe_error(error)}")


def describe_error(error: Exception) -> str:
    """One sentence about an error: the first one of its message, or which file is concerned and why."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{str(error.filename)!r}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[a-z)'\"][.!?])\s+(?=[A-Z])", text)[0]


def _exit(code, message):
    rank = os.environ.get("RANK")
    place = os.path.basename(sys.argv[0]) + (f" (process {rank})" if rank is not None else "")
    print(f"{place}: {message}", file=sys.stderr)
    sys.exit(code)
