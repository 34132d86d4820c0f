"""Rows that cannot be used: what is wrong with them, what takes their place, and the record of them."""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np


__all__ = ["DAMAGE_KINDS", "MAX_ATTEMPTS", "DamageReport", "DamagedRow", "first_good"]

EMPTY = "empty"  # no picture, or zero bytes
UNDECODABLE = "undecodable"  # bytes that are no picture
TRUNCATED = "truncated"  # they begin as a picture does, but its pixels cannot all be read
TOO_SMALL = "too_small"  # the shorter side is below `min_image_side`
TOO_LARGE = "too_large"  # a decompression bomb
NO_CAPTION = "no_caption"  # missing or blank
BAD_LABEL = "bad_label"  # missing, or none of the classes
BROKEN_SHARD = "broken_shard"  # a streamed file breaks off at this row: the rest of it is skipped
DAMAGE_KINDS = (EMPTY, UNDECODABLE, TRUNCATED, TOO_SMALL, TOO_LARGE, NO_CAPTION, BAD_LABEL, BROKEN_SHARD)

MAX_ATTEMPTS = 100  # rows tried for one place
MIN_ROWS = 100  # before so many rows have been read, or all that there are, a share says little
SHOWN_ROWS = 5


class DamagedRow(ValueError):
    """A row that cannot be used.

    Args:
        kind: one of `DAMAGE_KINDS`.
        message: what is wrong with this row.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def first_good(
    make_example: Callable[[dict, np.random.Generator], dict],
    candidates: Iterable[tuple[int, dict, np.random.Generator]],
) -> dict:
    """The example of the first candidate (row id, row, random numbers) that is not damaged.

    Returns:
        What `make_example(row, random)` gives, with the row's id as `"row_ids"` and, as `"damaged"`, the list of
        (row id, kind) of the candidates before it.

    Raises:
        ValueError: all candidates are damaged.
    """
    damaged = []
    for row_id, row, random in candidates:
        try:
            return {**make_example(row, random), "row_ids": row_id, "damaged": damaged}
        except DamagedRow as error:
            damaged.append((row_id, error.kind))
    report = DamageReport()
    report.add(damaged)
    raise ValueError(f"{len(damaged)} rows, drawn one after the other for the same place, are all damaged: {report}")


class DamageReport:
    """The damaged rows of a run: each counts once, however often it is met."""

    def __init__(self):
        self._kinds: dict[int, str] = {}

    def __str__(self):
        return "; ".join(
            f"{len(rows)} {kind} (rows {', '.join(map(str, rows[:SHOWN_ROWS]))}{', ...' * (len(rows) > SHOWN_ROWS)})"
            for kind, rows in self.state().items()
        )

    def add(self, damaged: Iterable[tuple[int, str]]) -> None:
        """Add pairs (row id, kind), such as the `"damaged"` of a batch."""
        self._kinds.update(damaged)

    def counts(self) -> dict[str, int]:
        """Kind -> number of distinct rows, for the kinds that were met."""
        found = Counter(self._kinds.values())
        return {kind: found[kind] for kind in DAMAGE_KINDS if kind in found}

    def check(self, rows_seen: int, max_share: float, num_rows: int | None = None) -> None:
        """Stop a run on bad data.

        Args:
            rows_seen: rows read so far, with repetitions.
            max_share: the part of the distinct rows among them that may be damaged.
            num_rows: how many rows there are, if that is known; nothing is checked before all or 100 have been read.

        Raises:
            ValueError: more are damaged; the message has the kinds and some of the rows.
        """
        rows = rows_seen if num_rows is None else min(rows_seen, num_rows)
        enough = MIN_ROWS if num_rows is None else min(MIN_ROWS, num_rows)
        if rows >= enough and len(self._kinds) > max_share * rows:
            raise ValueError(
                f"{len(self._kinds)} of the {rows} rows read are damaged, more than a share of "
                f"max_damaged_share={max_share}: {self}"
            )

    def state(self) -> dict[str, list[int]]:
        """Kind -> ids of its rows in ascending order: JSON, and what `load` takes."""
        rows = {kind: sorted(row for row, other in self._kinds.items() if other == kind) for kind in DAMAGE_KINDS}
        return {kind: ids for kind, ids in rows.items() if ids}

    def load(self, state: dict[str, list[int]]) -> None:
        """Go on from what `state` gave."""
        self._kinds = {row: kind for kind, rows in state.items() for row in rows}
