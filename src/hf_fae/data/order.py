"""The order in which a run sees the rows of a data set: a function of the seed and of the number of images seen.

Pictures and the latents cached of them share it, and the random numbers of each row: training sees the same of both.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler


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
    """Batches of (epoch, index) for one rank, from image number `images_seen` of the endless shuffled sequence on.

    Every epoch is a permutation of its own; a batch may span two. Batches of the ranks laid side by side are what one
    process with the `world_size`-fold batch size gets.
    """

    def __init__(self, length: int, batch_size: int, seed: int, images_seen: int, rank: int, world_size: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stride = images_seen + rank * batch_size, world_size * batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders = {}
        for start in itertools.count(self.start, self.stride):
            batch = []
            for position in range(start, start + self.batch_size):
                epoch, place = divmod(position, self.length)
                if epoch not in orders:
                    orders = {k: v for k, v in orders.items() if k == epoch - 1}
                    orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                batch.append((epoch, int(orders[epoch][place])))
            yield batch


def group_rows(values: Iterable) -> list[np.ndarray]:
    """The row numbers of each value, in the order in which the values first come."""
    groups = {}
    for row, value in enumerate(values):
        groups.setdefault(value, []).append(row)
    return [np.array(rows) for rows in groups.values()]


def choose_row(groups: list[np.ndarray] | None, seed: int, epoch: int, index: int) -> int:
    """The row at place `index` of the unshuffled epoch: that row, or of balanced data any of the group `index`."""
    if groups is None:
        return index
    rows = groups[index]
    # One number more than `row_random` is seeded with: the crops and mirrorings of the row are drawn independently.
    return int(rows[np.random.default_rng((seed, epoch, index, 0, 1)).integers(len(rows))])


def row_random(seed: int, epoch: int, row: int, attempt: int = 0) -> np.random.Generator:
    """The random numbers of a row in one epoch.

    Args:
        row: its place in the unshuffled epoch of indexed data, its id in streamed ones.
        attempt: how many damaged rows have stood in its place before.
    """
    return np.random.default_rng((seed, epoch, row, attempt))


def is_mirrored(random: np.random.Generator) -> bool:
    """Whether a row is mirrored: drawn after its crop, thus the first number of a picture cropped at the centre."""
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
    """Endless batches of rows that are called by (epoch, index), in the order of `PositionSampler`."""
    sampler = PositionSampler(len(rows), batch_size, seed, images_seen, rank, world_size)
    return load_batches(rows, collate, num_workers, batch_sampler=sampler)


def load_batches(rows: Dataset | IterableDataset, collate: Callable, num_workers: int, **order) -> Iterator[dict]:
    """Batches of a `DataLoader`; `order` are those of its arguments that say which rows come together."""
    generator = torch.Generator()  # of its own: starting the loader must not draw from the run's random numbers
    pin = torch.cuda.is_available()
    return iter(
        DataLoader(rows, **order, collate_fn=collate, num_workers=num_workers, pin_memory=pin, generator=generator)
    )
