"""What the training loop trains: the base of all objectives, and the noise that they share.

All randomness comes from the `ImageRandom` that accompanies a batch, so that an image has the same noise on any number
of processes.
"""

import math
from typing import NamedTuple

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from ..utils.randomness import ImageRandom


__all__ = ["Mean", "Objective", "add_noise", "check_not_negative", "sample_posterior"]


class Mean(NamedTuple):
    """A mean as its sum and its count, both scalars, to be pooled over steps and processes before the division."""

    sum: torch.Tensor
    count: torch.Tensor


def sample_posterior(posterior: DiagonalGaussianDistribution, random: ImageRandom) -> torch.Tensor:
    """A sample of the posterior of each image, with the images' own noise."""
    return posterior.mean + posterior.std * random.normal(*posterior.mean.shape).to(posterior.mean.dtype)


def add_noise(latents: torch.Tensor, sigma: float, random: ImageRandom) -> torch.Tensor:
    """Latents plus Gaussian noise of standard deviation `sigma`, as a flow trained on noisy latents samples them."""
    return latents + sigma * random.normal(*latents.shape).to(latents.dtype) if sigma else latents


class Objective(nn.Module):
    """What the loop trains: `forward(batch, random)` returns a dict with "loss" and further values to log.

    A scalar tensor is logged as its mean over steps and processes, a `Mean` as the quotient of its pooled sum and
    count.

    Args:
        model: the model; all of it is frozen except for the trained parts, and frozen parts stay in eval mode.
        trained: modules of `model` to train.
    """

    def __init__(self, model: nn.Module, trained: list[nn.Module]):
        super().__init__()
        self.model = model.requires_grad_(False)
        for part in trained:
            part.requires_grad_(True)

    @property
    def _no_split_modules(self) -> list[str]:
        """The blocks that FSDP2 shards one by one; Accelerate does not accept names of absent blocks."""
        names = getattr(self.model, "_no_split_modules", None) or []
        present = {type(module).__name__ for module in self.model.modules()}
        return [name for name in names if name in present]

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor | Mean]:
        raise NotImplementedError

    def parameter_groups(self) -> list[dict]:
        """Groups for the optimiser, each clipped by itself; the first one is averaged and saved.

        A group is a dict with "params", optionally "learning_rate" (by default the run's) and "name", under which its
        gradient norm is logged.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def before_step(self, step: int) -> None:
        """Called before every optimiser step with its number, from 0."""

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if module is not self and parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self


def check_not_negative(**values: float) -> None:
    """Refuse negative and infinite values.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
