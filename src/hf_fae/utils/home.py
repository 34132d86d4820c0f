"""Paths below the home directory, as users write them."""

import os


__all__ = ["expand_home"]


def expand_home(argument: str) -> str:
    """A flag or value whose path begins with "~/", which no shell has expanded: in YAML, or after "--name="."""
    flag, equals, value = argument.partition("=")
    if flag.startswith("--") and value.startswith("~/"):
        return f"{flag}{equals}{os.path.expanduser(value)}"
    return os.path.expanduser(argument) if argument.startswith("~/") else argument
