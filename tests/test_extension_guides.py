"""The checklists "Add a tokenizer" and "Add a generator", followed step by step in a copy of the repository.

Blocks of Python whose first line names a file become that file. In a block of `diff` the lines with `+` are added to
the file that its first line names, and those with `-` are replaced, at the one place where the other lines stand.
"""

import os
import shutil
import subprocess
import sys

import pytest
from documents import ROOT, Block, blocks


GUIDES = ROOT / "docs" / "guides"
# Guide -> the tests that it writes or extends, and what is called as `python -m pytest` with them.
FOLLOWED = {
    "add-a-tokenizer.md": [
        "tests/objectives/test_linear.py",
        "tests/test_pairs.py::test_pair[linear-LightningDiT]",
        "tests/test_pairs.py::test_pair[linear-STARFlow]",
    ],
    "add-a-generator.md": [
        "tests/generators/test_conv_denoiser.py",
        "tests/test_pairs.py::test_pair[FAE-convolutions]",
        "tests/test_pairs.py::test_pair[MAETok-convolutions]",
    ],
}


def follow(block: Block, copy) -> None:
    """Does what a block of a checklist says.

    Raises:
        ValueError: the block names no file, or its place in the file is not there, or there more than once.
    """
    first, _, text = block.text.partition("\n")
    if not first.startswith("# "):
        raise ValueError(f"line {block.line}: the first line of a block must be '# FILE', got {first!r}")
    path = copy / first[2:]
    if block.language == "python":
        path.write_text(text)
        return
    lines = [(line[:1], line[1:]) for line in text.splitlines()]
    before = "\n".join(line for mark, line in lines if mark != "+")
    after = "\n".join(line for mark, line in lines if mark != "-")
    source = path.read_text()
    if source.count(before) != 1:
        raise ValueError(f"line {block.line}: {first[2:]} must have this once, got {source.count(before)}:\n{before}")
    path.write_text(source.replace(before, after))


@pytest.fixture
def copy(tmp_path):
    """What the checklists change: the package and its tests."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("guide", FOLLOWED)
def test_checklist(guide, copy):
    steps = [block for block in blocks(GUIDES / guide) if block.language in ("python", "diff")]
    assert len(steps) >= 8
    for block in steps:
        follow(block, copy)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FOLLOWED[guide]]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"docs/guides/{guide}, followed to its end:\n{result.stdout}{result.stderr}"


def test_a_step_that_no_longer_fits_is_named(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="line 7: a.py must have this once, got 0:\ny = 1"):
        follow(Block("diff", "# a.py\n y = 1\n+z = 2\n", 7), tmp_path)
