"""The code in the documentation: blocks of README.md and the other pages, and the commands in them.

A shell block is read without a shell: the documentation may use assignments, `$NAME`, line continuations, comments,
`&&` and variables before a command. Anything else is an error, so that nothing is skipped silently.
"""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path


__all__ = ["ROOT", "Block", "Command", "Shell", "blocks", "inline_commands", "pages"]

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)(```+)([^\n]*)\n(.*?)^\1\2 *$", flags=re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
INCOMPLETE = re.compile(r"\.\.\.|(?<![=\w-])[A-Z_]+\b|^hf-fae evaluate \w+$")
PROGRAMS = ("make", "python", "pip", "hf-fae", "accelerate")


@dataclass
class Block:
    """A fenced block: its language, its text without indentation, and the line where it starts."""

    language: str
    text: str
    line: int


@dataclass
class Command:
    """The words of a command, and its own environment variables."""

    words: list[str]
    environment: dict[str, str]


def pages() -> list[Path]:
    """README.md and its neighbours, all pages of docs/, and the cards of the models in checkpoints/."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("checkpoints/**/README.md"))]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(fence[3].strip(), textwrap.dedent(fence[4]), text.count("\n", 0, fence.start()) + 1)
        for fence in FENCE.finditer(text)
    ]


def inline_commands(page: Path) -> list[str]:
    """Whole commands within sentences and tables: not just names, and without `...` or a NAME to fill in."""
    found = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
    commands = [code for code in found if code.split()[0] in PROGRAMS and not INCOMPLETE.search(code)]
    return [code for code in commands if len(code.split()) > (1 if code.startswith("make") else 2)]


class Shell:
    """Reads the shell blocks of one page, which share their variables.

    Args:
        text: the page; an inline `NAME=value` in its sentences sets a variable as well.
    """

    def __init__(self, text: str):
        self.variables = dict(re.findall(r"`([A-Z_]+)=([\w./-]+)`", text))

    def commands(self, text: str) -> list[Command]:
        """The commands of a block, with variables replaced.

        Raises:
            ValueError: an unknown variable, or unsupported shell syntax.
        """
        lines = text.replace("\\\n", " ").splitlines()
        return [command for line in lines for part in line.split(" && ") for command in self._command(part)]

    def _command(self, line: str) -> list[Command]:
        words = shlex.split(re.sub(r"\$\{?(\w+)\}?", self._value, line), comments=True)
        if words[:1] == ["export"]:
            words = words[1:]
        # A word with a space in it was quoted: a shell would not interpret its characters.
        if any(re.search(r"[|;<>&$]|^[*?]", word) for word in words if " " not in word):
            raise ValueError(f"not understood by tests/documents.py: {line!r}")
        count = next((index for index, word in enumerate(words) if not ASSIGNMENT.match(word)), len(words))
        assigned = dict(word.split("=", 1) for word in words[:count])
        if count == len(words):
            self.variables |= assigned
            return []
        return [Command(words[count:], assigned)]

    def _value(self, match: re.Match) -> str:
        if match[1] not in self.variables:
            raise ValueError(f"${match[1]} is not set on this page")
        return self.variables[match[1]]
