"""Rules of style that ruff does not check: short files, and calls that name their arguments."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "training_scripts", "experiments", "benchmarks")
FILES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 450
MAX_POSITIONAL = 5


def long_calls(source):
    """(line, number) of calls with more than `MAX_POSITIONAL` positional arguments, starred ones not counted."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    counts = [sum(not isinstance(argument, ast.Starred) for argument in call.args) for call in calls]
    return [(call.lineno, count) for call, count in zip(calls, counts, strict=True) if count > MAX_POSITIONAL]


@pytest.mark.parametrize("path", FILES)
def test_files_are_short_and_calls_name_their_arguments(path):
    source = (ROOT / path).read_text()
    assert len(source.splitlines()) <= MAX_LINES
    assert long_calls(source) == []


def test_long_calls_are_found():
    assert long_calls("f(1, 2, 3, 4, 5, a=6)\ng(*h)\nf(1, 2, 3, 4, 5, 6)\n") == [(3, 6)]
