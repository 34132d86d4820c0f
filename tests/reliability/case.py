"""A case of the reliability table, and what the kinds share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


__all__ = ["Case", "assert_sentence", "fork", "refused"]


class Case(NamedTuple):
    """Something that may go wrong; `run(folder)` raises AssertionError if anything was lost or unclear."""

    name: str
    run: Callable[[Path], None]

    def __str__(self) -> str:
        return self.name


def assert_sentence(text: str, *parts: str) -> None:
    """A message for users: one line without a traceback, which has all of `parts`."""
    assert text.strip() and "Traceback" not in text and "\n" not in text.strip(), f"not one sentence: {text[-2000:]}"
    missing = [part for part in parts if part not in text]
    assert not missing, f"{text.strip()!r} must say {missing}"


def refused(call: Callable[[], object], *names: str) -> None:
    """The call raises a ValueError of one sentence that has these names in it."""
    with pytest.raises(ValueError) as caught:
        call()
    assert_sentence(str(caught.value), *names)


def fork(run: Callable[[], None], output: Path) -> int:
    """Start `run` in a forked process, whose output goes to a file; returns its process id.

    What is imported here is imported there: that takes a fraction of a second.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            run()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
    finally:
        os._exit(code)
