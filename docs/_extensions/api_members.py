"""What the API reference shows of a class: members that hf_fae defines, inherited ones included, and no others.

Models and pipelines inherit hundreds of members from torch and diffusers, which have their own references. The
arguments of scripts and tasks are fields of dataclasses whose texts are those of `--help`: they become a list.
Docstrings are prose with `code` in it and Google's sections; stars and bars in them are formulas, not markup.
"""

import dataclasses
import functools
import inspect
import re


# Either code, which stays as it is, or a character that reStructuredText would take for markup.
CODE = re.compile(r"(``.*?``|`[^`]*`)|[*|]", re.DOTALL)


def skip_foreign(app, what, name, member, skip, options) -> bool | None:
    """Skips members of a class that other packages define, and the fields of dataclasses."""
    if what != "class":  # members of a module are those of its `__all__`
        return None
    if isinstance(member, functools.cached_property):
        member = member.func
    function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", None) or member)
    is_ours = str(getattr(function, "__module__", "")).startswith("hf_fae")
    return None if is_ours and callable(function) and function.__doc__ else True


def escape_formulas(app, what, name, obj, options, lines: list[str]) -> None:
    """Escapes stars and bars outside of code: they are products and absolute values."""
    text = CODE.sub(lambda part: part[0] if part[1] else rf"\{part[0]}", "\n".join(lines))
    lines[:] = text.split("\n")


def list_arguments(app, what, name, obj, options, lines: list[str]) -> None:
    """Adds the arguments of a dataclass, with their defaults and the texts of `--help`, to its docstring."""
    fields = _arguments(obj)
    if fields:
        lines += ["", ":Arguments:", ""]
    for field in fields:
        text = re.sub(r"[\\`*|_]", r"\\\g<0>", field.metadata["help"])
        lines += [f"    - ``{field.name}``{_default(field)}: {text}"]
    lines.append("")


def shorten_signature(app, what, name, obj, options, signature, return_annotation):
    """No signature where the arguments are listed."""
    return ("(...)", return_annotation) if _arguments(obj) else None


def _arguments(obj) -> list[dataclasses.Field]:
    is_dataclass = inspect.isclass(obj) and dataclasses.is_dataclass(obj)
    return [field for field in dataclasses.fields(obj) if "help" in field.metadata] if is_dataclass else []


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f" = ``{field.default_factory()!r}``"
    return "" if field.default is dataclasses.MISSING else f" = ``{field.default!r}``"


def setup(app) -> dict:
    app.connect("autodoc-skip-member", skip_foreign)
    app.connect("autodoc-process-docstring", escape_formulas, priority=100)  # before napoleon, which writes markup
    app.connect("autodoc-process-docstring", list_arguments, priority=900)
    app.connect("autodoc-process-signature", shorten_signature)
    return {"parallel_read_safe": True}
