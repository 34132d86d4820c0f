"""A case of a kind, and what all kinds share."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


__all__ = ["Case", "assert_sentence"]


class Case(NamedTuple):
    """`run` gets an empty folder, and raises `AssertionError` where something was lost or unclear."""

    name: str
    run: Callable[[Path], None]


def assert_sentence(text: str, *parts: str) -> None:
    """A message is one line without a traceback, and has all of `parts`."""
    assert text.strip() and "Traceback" not in text and "\n" not in text.strip(), f"not one sentence: {text[-2000:]}"
    missing = [part for part in parts if part not in text]
    assert not missing, f"{text.strip()!r} must say {missing}"
