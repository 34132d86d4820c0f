"""Whole numbers as callers have them: Python's, numpy's, and those in tensors and arrays without axes."""

import operator
from typing import Any


__all__ = ["whole_number"]


def whole_number(value: Any) -> int | None:
    """The number as Python's own, or None for anything that is no whole number; truth values are none."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool") or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
