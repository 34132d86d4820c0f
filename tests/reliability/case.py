"""A case of the reliability table, and what the kinds share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


__all__ = ["Case", "assert_one_sentence", "fork", "refused"]


class Case(NamedTuple):
    """Something that may go wrong; `run(folder)` raises AssertionError if anything was lost or unclear."""

    name: str
    run: Callable[[Path], None]

    def __str__(self) -> str:
        return self.name


def assert_one_sentence(text: str) -> None:
    """A message for users: no traceback, one line."""
    assert "Traceback" not in text, text[-2000:]
    assert text.strip() and "\n" not in text.strip(), text


def refused(call: Callable[[], object], *names: str) -> None:
    """The call raises a ValueError of one sentence that has these names in it."""
    with pytest.raises(ValueError) as caught:
        call()
    assert_one_sentence(str(caught.value))
    for name in names:
        assert name in str(caught.value), caught.value


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
