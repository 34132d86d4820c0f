"""Random numbers that belong to images rather than to processes.

Image number n of a run gets the same noise in any process and any batch: a run on eight devices and one on a single
device with eight times the batch size see the same numbers.
"""

import torch


__all__ = ["ImageRandom", "mix_seed"]


class ImageRandom:
    """The random numbers of one training step for consecutive images.

    Args:
        seed: of the run.
        first_image: number of the batch's first image, counted from the start of the run over all processes.
        device: where the numbers are generated; CPU and GPU give different ones.

    Every call gives new numbers; repeating the same calls in the same order reproduces them.
    """

    def __init__(self, seed: int, first_image: int, device: torch.device | str = "cpu"):
        self.seed, self.first_image = seed, first_image
        self.generator = torch.Generator(device)
        self._calls = 0

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, fp32, of a shape (B, ...): B images."""
        return self._fill(torch.empty(shape, device=self.generator.device), torch.Tensor.normal_)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Numbers in [0, 1), fp32, of a shape (B, ...): B images."""
        return self._fill(torch.empty(shape, device=self.generator.device), torch.Tensor.uniform_)

    def of_batch(self) -> float:
        """A number in [0, 1) for the whole batch, by its first image, without synchronising with the device."""
        self._calls += 1
        return (mix_seed(self.seed, self.first_image, self._calls) >> 11) / 2**53

    @torch.compiler.disable
    def shared_uniform(self) -> float:
        """Another one, by torch's CPU generator."""
        self._calls += 1
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.first_image, self._calls))
        return torch.rand((), generator=generator).item()

    @torch.compiler.disable
    def _fill(self, numbers, fill):
        self._calls += 1
        for offset, row in enumerate(numbers.unbind()):
            self.generator.manual_seed(mix_seed(self.seed, self.first_image + offset, self._calls))
            fill(row, generator=self.generator)
        return numbers


def mix_seed(*values: int) -> int:
    """A 64-bit hash of integers (the finaliser of splitmix64) as a seed; torch's CPU generator uses its lower half."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state
