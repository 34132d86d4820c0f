"""Rows that are read while training: an order that is shuffled and still found again by counting."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .damage import MAX_ATTEMPTS, first_good


__all__ = ["StreamedRows"]

ROWS_PER_SHARD = 10**9  # row 7 of shard 3 has the id 3_000_000_007
RESERVE_ROWS = 64


class StreamedRows(IterableDataset):
    """The endless examples of one reader, a reader being one worker of one rank.

    Readers share shards in groups, as many groups as divide both numbers: with shards for all every reader has shards
    of its own; the readers of a group deal out its rows among them, in turn. In every epoch a group's shards come in
    another order, and rows are shuffled within blocks. A place in the sequence is found again by counting: the rows
    before it are read but not decoded, at most two epochs of them.

    A damaged row is replaced by one of its block or, as the block may be short or a whole shard damaged, by one of a
    reserve: rows from all over the first epoch, which every reader passes through, also when a run is resumed.

    Args:
        data: the `ImageData`.
        batch_size: rows in a batch: the loader takes a whole batch from one worker, then one from the next.
        first_batch: batches of this rank to pass over.
        rank, world_size: this process, and how many share the data.
    """

    def __init__(self, data, batch_size: int, first_batch: int, rank: int, world_size: int):
        self.data, self.batch_size, self.first_batch = data, batch_size, first_batch
        self.rank, self.world_size = rank, world_size
        # The first N rows are not cut into shards, or they would depend on the number of readers.
        self.num_shards = data.train.num_shards if data.args.max_train_samples is None else 1

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
                    yield first_good(self.data._example, self._candidates(epoch, block[place], block, reserve))
                skip = max(0, skip - len(block))
            if length == 0:
                raise ValueError(f"{args.dataset_name!r} has no rows for reader {reader}: use fewer workers")

    def _rows(self, epoch, reader, num_readers):
        """The reader's (row id, row) of one epoch."""
        groups = math.gcd(self.num_shards, num_readers)
        group, turn, turns = reader % groups, reader // groups, num_readers // groups
        order = np.random.default_rng((self.data.seed, epoch, group)).permutation(self.num_shards // groups)
        shards = itertools.chain.from_iterable(self._shard_rows(int(shard) * groups + group) for shard in order)
        return itertools.islice(shards, turn, None, turns)

    def _shard_rows(self, shard):
        rows = self.data.train if self.num_shards == 1 else self.data.train.shard(self.num_shards, shard)
        # `iter` rather than `__iter__`: the latter would split the rows among the workers once more. One by one, since
        # `datasets` 4 cannot join rows of a WebDataset of which some lack a file.
        for number, columns in enumerate(rows.iter(batch_size=1)):
            yield shard * ROWS_PER_SHARD + number, {name: values[0] for name, values in columns.items()}

    def _candidates(self, epoch, first, block, reserve):
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng((self.data.seed, epoch, first[0], attempt))
            pool = block if attempt < MAX_ATTEMPTS // 2 else reserve
            row_id, row = pool[rng.integers(len(pool))] if attempt else first
            yield row_id, row, rng
