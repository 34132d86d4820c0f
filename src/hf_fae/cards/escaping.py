"""Foreign text in a card: class names, ids and paths show as they are, and are no Markdown, HTML or code."""

import html
import json
import re
import shlex
from urllib.parse import quote

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


__all__ = ["FILTERS"]


def escape_text(value) -> str:
    """One line of text. Underscores within words mean nothing to Markdown."""
    text = html.escape(one_line(value), quote=False)
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def code_span(value) -> str:
    """Text in a code span, whose fence is longer than any run of backticks in it."""
    text = one_line(value).replace("|", "\u2502")  # a bar would end the cell of a table
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def code_block(text: str, language: str) -> str:
    """A code block, whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def python_string(value) -> str:
    """A string literal of Python with double quotes, on one line."""
    return json.dumps(str(value), ensure_ascii=False)


def one_line(value) -> str:
    """Without line breaks, for a comment."""
    return " ".join(str(value).split())


def hub_link(value) -> str:
    """A link to a repository of the Hub; anything but an id is code."""
    try:
        validate_repo_id(str(value))
    except HFValidationError:
        return code_span(value)
    return f"[{escape_text(value)}](https://huggingface.co/{value})"


FILTERS = {
    "text": escape_text,
    "code": code_span,
    "block": code_block,
    "string": python_string,
    "line": one_line,
    "hub_link": hub_link,
    "path": quote,
    "python": repr,
    "shell": shlex.join,
    "yaml": lambda value: yaml.safe_dump(value, sort_keys=False),
}
