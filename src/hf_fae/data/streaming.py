"""Streamed rows: read while training, in a shuffled order that a resumed run finds again by counting."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .corrupt import BROKEN_SHARD, MAX_ATTEMPTS, CorruptionReport, first_good
from .order import row_random
from .reading import read_rows


__all__ = ["StreamedRows", "open_shard"]

ROWS_PER_SHARD = 10**9  # row 7 of shard 3 has the id 3_000_000_007
RESERVE_ROWS = 64


def open_shard(rows, num_shards: int, shard: int):
    """One of `num_shards` shards of an `IterableDataset`."""
    return rows if num_shards == 1 else rows.shard(num_shards, shard)


class StreamedRows(IterableDataset):
    """The endless examples of one reader; a reader is one worker of one rank.

    With at least as many shards as readers, reader r of n has the shards r, r + n, ..., and no file is read twice.
    Otherwise readers share shards in groups, whose number is the greatest common divisor of shards and readers, and
    the readers of a group take its rows in turn. In every epoch the order of a reader's shards changes, and rows are
    shuffled within blocks. A position in the sequence is found again by counting: the rows before it are read but not
    decoded, at most two epochs of them.

    Every reader has its own epochs, each with all of its rows once. Where n does not divide the number of shards, some
    readers have one shard more than others, and their epochs are longer by its rows. As all readers yield the same
    number of rows, those of the longer epochs appear less often: with 294 shards and 64 readers, 4 times instead of 5.
    Many shards per reader make the difference small.

    A row of the same block replaces a corrupt one or, as the block may be short or a whole shard corrupt, a row of a
    reserve: rows from the whole first epoch, which every reader passes through, also when a run is resumed. The rest
    of a shard that ends early is skipped, and the next example reports it.

    Args:
        data: the `ImageData`.
        batch_size: rows per batch: the loader takes a whole batch from one worker, then one from the next.
        first_batch: batches of this rank to skip.
        rank, world_size: this process, and the number of processes that share the data.
    """

    def __init__(self, data, batch_size: int, first_batch: int, rank: int, world_size: int):
        self.data, self.batch_size, self.first_batch = data, batch_size, first_batch
        self.rank, self.world_size = rank, world_size
        self.broken: list[tuple[int, str]] = []  # (row id, kind), not yet reported

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # Batches come from the workers in turn, always starting with worker 0: after a restart this worker takes over
        # from the one whose turn it was.
        worker = (self.first_batch + worker) % num_workers
        reader, num_readers = self.rank * num_workers + worker, self.world_size * num_workers
        skip = len(range(worker, self.first_batch, num_workers)) * self.batch_size

        args, seed = self.data.args, self.data.seed
        length, reserve = None, [None] * RESERVE_ROWS
        for epoch in itertools.count():
            if length is not None and skip >= length:
                skip -= length
                continue
            length, rows = 0, self._rows(epoch, reader, num_readers)
            for number in itertools.count():
                block = list(itertools.islice(rows, args.shuffle_block))
                if not block:
                    break
                length += len(block)
                rng = np.random.default_rng((seed, epoch, reader, number))
                order = rng.permutation(len(block))
                if epoch == 0:  # each block so far has the same share of the reserve
                    for slot in np.flatnonzero(rng.random(RESERVE_ROWS) < 1 / (number + 1)):
                        reserve[slot] = block[rng.integers(len(block))]
                for index in order[skip:]:
                    example = first_good(self.data.example, self._candidates(epoch, block[index], block, reserve))
                    example["corrupt"] += self.broken
                    self.broken = []
                    yield example
                skip = max(0, skip - len(block))
            if length == 0:
                report = CorruptionReport()
                report.add(self.broken)
                reason = f"its shards are broken: {report}" if self.broken else "use fewer workers"
                raise ValueError(f"{args.dataset_name!r} has no rows for reader {reader}: {reason}")

    def _rows(self, epoch, reader, num_readers):
        """The reader's (row id, row) of one epoch."""
        num_shards = self.data.num_shards
        groups = num_readers if num_shards >= num_readers else math.gcd(num_shards, num_readers)
        group, turn, turns = reader % groups, reader // groups, num_readers // groups
        mine = range(group, num_shards, groups)
        order = np.random.default_rng((self.data.seed, epoch, group)).permutation(len(mine))
        shards = itertools.chain.from_iterable(self._shard_rows(mine[index]) for index in order)
        return itertools.islice(shards, turn, None, turns)

    def _shard_rows(self, shard):
        first = shard * ROWS_PER_SHARD
        rows = open_shard(self.data.train, self.data.num_shards, shard)
        for number, row in read_rows(rows, lambda number: self.broken.append((first + number, BROKEN_SHARD))):
            yield first + number, row

    def _candidates(self, epoch, first, block, reserve):
        for attempt in range(MAX_ATTEMPTS):
            random = row_random(self.data.seed, epoch, first[0], attempt)
            pool = block if attempt < MAX_ATTEMPTS // 2 else reserve
            row_id, row = pool[random.integers(len(pool))] if attempt else first
            yield row_id, row, random
