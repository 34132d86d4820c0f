"""The order in which a run sees the rows of a data set: a function of the seed and of the number of images seen.

Images and their cached latents share the order and each row's random numbers, so that training sees the same of both.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..utils.stopping import ignore_signals


__all__ = [
    "PositionSampler",
    "choose_row",
    "group_rows",
    "indexed_batches",
    "is_mirrored",
    "load_batches",
    "row_random",
]


class PositionSampler(Sampler):
    """Batches of (epoch, index) for one rank of the endless shuffled sequence, starting at image `images_seen`.

    Every epoch has its own permutation; a batch may span two. The batches of all ranks side by side are the batch that
    a single process with `world_size` times the batch size gets.

    Args:
        length: rows of an epoch.
        batch_size: rows of this rank per batch.
        seed: of the permutations.
        images_seen: rows that all ranks together have consumed so far.
        rank, world_size: this process, and the number of processes.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, *, images_seen: int = 0, rank: int = 0, world_size: int = 1
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stride = images_seen + rank * batch_size, world_size * batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders = {}
        for start in itertools.count(self.start, self.stride):
            batch = []
            for position in range(start, start + self.batch_size):
                epoch, index = divmod(position, self.length)
                if epoch not in orders:
                    orders = {k: v for k, v in orders.items() if k == epoch - 1}
                    orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                batch.append((epoch, int(orders[epoch][index])))
            yield batch


def group_rows(values: Iterable) -> list[np.ndarray]:
    """The row numbers of each value, ordered by first occurrence."""
    groups = {}
    for row, value in enumerate(values):
        groups.setdefault(value, []).append(row)
    return [np.array(rows) for rows in groups.values()]


def choose_row(groups: list[np.ndarray] | None, seed: int, epoch: int, index: int) -> int:
    """The row at `index` of the unshuffled epoch: row `index` or, for balanced data, a random row of group `index`."""
    if groups is None:
        return index
    rows = groups[index]
    # One number more than the seed of `row_random`: crop and mirroring of the row are independent of its choice.
    return int(rows[np.random.default_rng((seed, epoch, index, 0, 1)).integers(len(rows))])


def row_random(seed: int, epoch: int, row: int, attempt: int = 0) -> np.random.Generator:
    """The random numbers of a row in one epoch.

    Args:
        row: its index in the unshuffled epoch of indexed data, its id in streamed data.
        attempt: number of corrupt rows already tried at this position.
    """
    return np.random.default_rng((seed, epoch, row, attempt))


def is_mirrored(random: np.random.Generator) -> bool:
    """Whether a row is mirrored, decided after its crop: for a centre crop by the first random number."""
    return bool(random.random() < 0.5)


def indexed_batches(
    rows: Dataset,
    collate: Callable,
    seed: int,
    batch_size: int,
    *,
    images_seen: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[dict]:
    """Endless batches of rows that are indexed by (epoch, index), in the order of `PositionSampler`."""
    position = {"images_seen": images_seen, "rank": rank, "world_size": world_size}
    sampler = PositionSampler(len(rows), batch_size, seed, **position)
    return load_batches(rows, collate, num_workers, batch_sampler=sampler)


def load_batches(rows: Dataset | IterableDataset, collate: Callable, num_workers: int, **order) -> Iterator[dict]:
    """Batches of a `DataLoader`; `order` are its arguments that determine which rows form a batch."""
    generator = torch.Generator()  # its own: starting the loader must not consume the run's random numbers
    pin = torch.cuda.is_available()
    return iter(
        DataLoader(
            rows,
            **order,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=pin,
            generator=generator,
            worker_init_fn=ignore_signals,
        )
    )
