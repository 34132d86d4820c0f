"""Two-way tables of keys between a published state dict and ours.

A table is a list of rules `(published, ours)` or `(published, ours, transform)`; names may contain

- `{i}`, `{j}`, ...: a whole number, the same on both sides (`{i+8}` is it plus 8);
- `{weight,bias}`, ...: one of these words, the same on both sides; a word that is absent has no row.

Either side may be a tuple of names: `split_qkv` makes three tensors of one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .transforms import IDENTITY, Transform


__all__ = ["KeyTable", "Rule"]

Names = str | tuple[str, ...]
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Rule:
    """Which published names become which of ours, and by which transform (see the module)."""

    published: Names
    ours: Names
    transform: Transform = IDENTITY

    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple((side,) if isinstance(side, str) else side for side in (self.published, self.ours))


class KeyTable:
    """The keys of one family of checkpoints.

    Args:
        rules: each a `Rule` or a tuple of its arguments.
        dropped: published names that have no counterpart in ours: fixed tables, training heads.
    """

    def __init__(self, rules: list[Rule | tuple], dropped: tuple[str, ...] = ()):
        self.rules = [rule if isinstance(rule, Rule) else Rule(*rule) for rule in rules]
        self.dropped = [re.compile(_pattern(name)) for name in dropped]

    def to_ours(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our state dict of a published one; tensors are views of the published ones where no value changes.

        Raises:
            ValueError: a key that no rule knows, a rule of which a key is missing, or a tensor of a shape that its
                transform refuses.
        """
        ours, used = {}, set()
        for rule in self.rules:
            published, names = rule.sides()
            for binding in _bindings(published[0], state):
                keys = [_fill(name, binding) for name in published]
                if missing := [key for key in keys if key not in state]:
                    raise ValueError(f"checkpoint must have {missing[0]!r} beside {keys[0]!r}")
                used.update(keys)
                ours.update(
                    _transformed(rule.transform.to_ours, state, keys, [_fill(name, binding) for name in names])
                )
        unknown = [key for key in state if key not in used and not any(name.fullmatch(key) for name in self.dropped)]
        if unknown:
            raise ValueError(
                f"checkpoint must hold only keys of its family, got {unknown[0]!r} ({len(unknown)} unknown)"
            )
        return ours

    def to_published(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The published state dict of ours, without what `to_ours` drops.

        Raises:
            ValueError: as `to_ours`.
        """
        published, used = {}, set()
        for rule in self.rules:
            names, ours = rule.sides()
            for binding in _bindings(ours[0], state):
                keys = [_fill(name, binding) for name in ours]
                if missing := [key for key in keys if key not in state]:
                    raise ValueError(f"model must have {missing[0]!r} beside {keys[0]!r}")
                used.update(keys)
                made = [_fill(name, binding) for name in names]
                published.update(_transformed(rule.transform.to_published, state, keys, made))
        if unknown := [key for key in state if key not in used]:
            raise ValueError(f"model must hold only keys of the table, got {unknown[0]!r} ({len(unknown)} unknown)")
        return published


def _transformed(function, state, keys, names):
    try:
        tensors = function(*(state[key] for key in keys))
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{key!r} {tuple(state[key].shape)}" for key in keys)
        raise ValueError(f"checkpoint must have tensors of the shapes of its family, got {shapes}") from error
    return zip(names, tensors if isinstance(tensors, (tuple, list)) else (tensors,), strict=True)


def _groups(name: str) -> Iterator[tuple[str, str]]:
    """The placeholders of a name: what each is called, and the regular expression of its values."""
    words = 0
    for text in PLACEHOLDER.findall(name):
        if "," in text:
            words += 1
            yield f"words{words}", "|".join(map(re.escape, text.split(",")))
        else:
            yield re.match(r"\w+", text)[0], r"\d+"


def _pattern(name: str) -> str:
    """The regular expression of a name; `*` stands for any text."""
    literals = [re.escape(part).replace(r"\*", ".*") for part in PLACEHOLDER.split(name)[::2]]
    parts = [f"(?P<{group}>{values})" for group, values in _groups(name)]
    return "".join(part for pair in zip(literals, [*parts, ""], strict=True) for part in pair)


def _bindings(name: str, state: Mapping[str, torch.Tensor]) -> list[dict[str, str]]:
    """Values of the placeholders of a name, for each key that matches it; `{i+8}` matches what is 8 or more."""
    pattern, bindings = re.compile(_pattern(name)), []
    offsets = {re.match(r"\w+", text)[0]: int(text.partition("+")[2] or 0) for text in PLACEHOLDER.findall(name)}
    for key in state:
        if match := pattern.fullmatch(key):
            values = {
                group: value if group.startswith("words") else int(value) - offsets[group]
                for group, value in match.groupdict().items()
            }
            if all(not isinstance(value, int) or value >= 0 for value in values.values()):
                bindings.append(values)
    return bindings


def _fill(name: str, binding: dict[str, str]) -> str:
    """A name with the values of its placeholders."""
    groups = iter([group for group, _ in _groups(name)])

    def value(match):
        group = next(groups)
        if group.startswith("words"):
            return binding[group]
        return str(binding[group] + int(match[1].partition("+")[2] or 0))

    return PLACEHOLDER.sub(value, name)
