"""Corrupt rows: the kinds of corruption, the rows that replace them, and the record of them."""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np


__all__ = ["CORRUPTION_KINDS", "MAX_ATTEMPTS", "CorruptRow", "CorruptionReport", "first_good"]

EMPTY = "empty"  # no image, or zero bytes
MISSING = "missing"  # no file of that path
UNSAFE = "unsafe"  # a path or URL outside of the data set
UNDECODABLE = "undecodable"  # no image of a supported format, or values without a documented range
TRUNCATED = "truncated"  # they start like an image, but not all of its pixels can be read
TOO_SMALL = "too_small"  # the shorter side is below `min_image_side`
TOO_LARGE = "too_large"  # a decompression bomb
NO_CAPTION = "no_caption"  # missing or blank
BAD_LABEL = "bad_label"  # missing, or none of the classes
BROKEN_SHARD = "broken_shard"  # a streamed file ends early at this row: the rest of it is skipped
CORRUPTION_KINDS = (
    EMPTY,
    MISSING,
    UNSAFE,
    UNDECODABLE,
    TRUNCATED,
    TOO_SMALL,
    TOO_LARGE,
    NO_CAPTION,
    BAD_LABEL,
    BROKEN_SHARD,
)

MAX_ATTEMPTS = 100  # rows tried for one position
MIN_ROWS = 100  # the share is not checked before so many rows, or all that there are, have been read
SHOWN_ROWS = 5


class CorruptRow(ValueError):
    """A row that cannot be used.

    Args:
        kind: one of `CORRUPTION_KINDS`.
        message: what is wrong with this row.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def first_good(
    make_example: Callable[[dict, np.random.Generator], dict],
    candidates: Iterable[tuple[int, dict, np.random.Generator]],
) -> dict:
    """The example of the first candidate (row id, row, random numbers) that is not corrupt.

    Returns:
        The result of `make_example(row, random)`, with the row's id as "row_ids" and, as "corrupt", the list of
        (row id, kind) of the candidates before it.

    Raises:
        ValueError: all candidates are corrupt.
    """
    corrupt = []
    for row_id, row, random in candidates:
        try:
            return {**make_example(row, random), "row_ids": row_id, "corrupt": corrupt}
        except CorruptRow as error:
            corrupt.append((row_id, error.kind))
    report = CorruptionReport()
    report.add(corrupt)
    raise ValueError(f"{len(corrupt)} rows, tried in turn for one position, are all corrupt: {report}")


class CorruptionReport:
    """The corrupt rows of a run; each counts once, however often it is met."""

    def __init__(self):
        self._kinds: dict[int, str] = {}

    def __str__(self):
        return "; ".join(
            f"{len(rows)} {kind} (rows {', '.join(map(str, rows[:SHOWN_ROWS]))}{', ...' * (len(rows) > SHOWN_ROWS)})"
            for kind, rows in self.state().items()
        )

    def add(self, corrupt: Iterable[tuple[int, str]]) -> None:
        """Add pairs (row id, kind), such as the "corrupt" of a batch."""
        self._kinds.update(corrupt)

    def counts(self) -> dict[str, int]:
        """Kind -> number of distinct rows, for the kinds that were met."""
        found = Counter(self._kinds.values())
        return {kind: found[kind] for kind in CORRUPTION_KINDS if kind in found}

    def check(self, rows_seen: int, max_share: float, num_rows: int | None = None) -> None:
        """Stop a run on bad data.

        Args:
            rows_seen: rows read so far, with repetitions.
            max_share: largest accepted share of corrupt rows among the distinct rows read.
            num_rows: number of rows, if known; nothing is checked before all or 100 of them have been read.

        Raises:
            ValueError: more are corrupt; the message names the kinds and some of the rows.
        """
        rows = rows_seen if num_rows is None else min(rows_seen, num_rows)
        enough = MIN_ROWS if num_rows is None else min(MIN_ROWS, num_rows)
        if rows >= enough and len(self._kinds) > max_share * rows:
            raise ValueError(
                f"{len(self._kinds)} of the {rows} rows read are corrupt, more than a share of "
                f"max_corrupt_share={max_share}: {self}"
            )

    def state(self) -> dict[str, list[int]]:
        """Kind -> row ids in ascending order: JSON-able, for `load`."""
        rows = {kind: sorted(row for row, other in self._kinds.items() if other == kind) for kind in CORRUPTION_KINDS}
        return {kind: ids for kind, ids in rows.items() if ids}

    def load(self, state: dict[str, list[int]]) -> None:
        """Continue from what `state` returned."""
        self._kinds = {row: kind for kind, rows in state.items() for row in rows}
