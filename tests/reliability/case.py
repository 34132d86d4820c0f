"""A case of a kind, and what all kinds share."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


__all__ = ["Case", "assert_sentence", "fork", "refused"]


class Case(NamedTuple):
    """`run` gets an empty folder, and raises `AssertionError` where something was lost or unclear."""

    name: str
    run: Callable[[Path], None]


def assert_sentence(text: str, *parts: str) -> None:
    """A message is one line without a traceback, and has all of `parts`."""
    assert text.strip() and "Traceback" not in text and "\n" not in text.strip(), f"not one sentence: {text[-2000:]}"
    missing = [part for part in parts if part not in text]
    assert not missing, f"{text.strip()!r} must say {missing}"


def refused(call: Callable[[], object], *parts: str) -> None:
    """The call raises a ValueError of one sentence that has all of `parts`."""
    try:
        call()
    except ValueError as error:
        assert_sentence(str(error), *parts)
    else:
        raise AssertionError(f"nothing was refused, where {parts} should have been named")


def fork(run: Callable[[], None], output: Path) -> int:
    """Start `run` in a forked process, whose output goes to a file; returns its process id.

    What is imported here is imported there, so that a process costs a fraction of a second.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = open(output, "w", buffering=1)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file  # pytest has put files of its own in their places
        run()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
