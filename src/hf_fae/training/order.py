"""The order in which a run sees the rows of a data set: a function of the seed and of the number of images seen."""

import itertools
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


__all__ = ["PositionSampler"]


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
