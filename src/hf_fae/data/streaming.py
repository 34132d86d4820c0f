"""Rows that are read while training: an order that is shuffled and still found again by counting."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .corrupt import BROKEN_SHARD, MAX_ATTEMPTS, DamageReport, first_good
from .order import row_random
from .reading import read_rows


__all__ = ["StreamedRows", "open_shard"]

ROWS_PER_SHARD = 10**9  # row 7 of shard 3 has the id 3_000_000_007
RESERVE_ROWS = 64


def open_shard(rows, num_shards: int, shard: int):
    """One of `num_shards` shards of an `IterableDataset`."""
    return rows if num_shards == 1 else rows.shard(num_shards, shard)


class StreamedRows(IterableDataset):
    """The endless examples of one reader, a reader being one worker of one rank.

    Where there are shards for all, they are dealt out: reader r of n has the shards r, r + n, ... and nobody reads a
    file twice. Otherwise readers share shards in groups, as many groups as divide both numbers, and the readers of a
    group deal out its rows among them, in turn. In every epoch a reader's shards come in another order, and rows are
    shuffled within blocks. A place in the sequence is found again by counting: the rows before it are read but not
    decoded, at most two epochs of them.

    An epoch is a reader's own: it has each of its rows once. Where n does not divide the number of shards, some
    readers have a shard more than others, and their epochs are longer by its rows. As all readers give the same number
    of rows, those of the longer epochs come up less often: with 294 shards and 64 readers, 4 times instead of 5. Many
    shards per reader make that small.

    A damaged row is replaced by one of its block or, as the block may be short or a whole shard damaged, by one of a
    reserve: rows from all over the first epoch, which every reader passes through, also when a run is resumed. Of a
    shard that breaks off, the rest is skipped, and the next example reports it.

    Args:
        data: the `ImageData`.
        batch_size: rows in a batch: the loader takes a whole batch from one worker, then one from the next.
        first_batch: batches of this rank to pass over.
        rank, world_size: this process, and how many share the data.
    """

    def __init__(self, data, batch_size: int, first_batch: int, rank: int, world_size: int):
        self.data, self.batch_size, self.first_batch = data, batch_size, first_batch
        self.rank, self.world_size = rank, world_size
        self.broken: list[tuple[int, str]] = []  # (row id, kind), not reported yet

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # Batches come from the workers in turn, always starting with worker 0: after a restart this worker takes the
        # part of the one whose turn it was.
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
                if epoch == 0:  # each block so far has the same part of the reserve
                    for slot in np.flatnonzero(rng.random(RESERVE_ROWS) < 1 / (number + 1)):
                        reserve[slot] = block[rng.integers(len(block))]
                for place in order[skip:]:
                    example = first_good(self.data.example, self._candidates(epoch, block[place], block, reserve))
                    example["damaged"] += self.broken
                    self.broken = []
                    yield example
                skip = max(0, skip - len(block))
            if length == 0:
                report = DamageReport()
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
        shards = itertools.chain.from_iterable(self._shard_rows(mine[place]) for place in order)
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
