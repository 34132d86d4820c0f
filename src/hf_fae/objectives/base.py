"""What the loop trains, and the noise that objectives of tokenizers and of generators have in common.

All randomness is drawn from the `ImageRandom` that comes with a batch, so that an image has the same noise on any
number of processes.
"""

import math

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from ..utils.randomness import ImageRandom


__all__ = [
    "Objective",
    "add_noise",
    "check_not_negative",
    "check_stage",
    "sample_posterior",
]


def sample_posterior(posterior: DiagonalGaussianDistribution, random: ImageRandom) -> torch.Tensor:
    """A sample of the posterior of each image, with the images' own noise."""
    return posterior.mean + posterior.std * random.normal(*posterior.mean.shape).to(posterior.mean.dtype)


def add_noise(latents: torch.Tensor, sigma: float, random: ImageRandom) -> torch.Tensor:
    """Latents with Gaussian noise of standard deviation `sigma`, as a flow that was trained so draws them."""
    return latents + sigma * random.normal(*latents.shape).to(latents.dtype) if sigma else latents


class Objective(nn.Module):
    """What the loop trains: `forward(batch, random)` returns a dict of tensors, "loss" and whatever is worth logging.

    Scalars are logged as their mean over steps and processes; a tensor of two numbers is a sum and a count, logged as
    their quotient over an interval.

    Args:
        model: what is trained; all of it is frozen but the named parts, and what is frozen stays in eval mode.
        trained: modules of `model` to train.
    """

    def __init__(self, model: nn.Module, trained: list[nn.Module]):
        super().__init__()
        self.model = model.requires_grad_(False)
        for part in trained:
            part.requires_grad_(True)

    @property
    def _no_split_modules(self) -> list[str]:
        """The blocks that FSDP2 shards one by one; Accelerate refuses names of blocks that are not there."""
        names = getattr(self.model, "_no_split_modules", None) or []
        present = {type(module).__name__ for module in self.model.modules()}
        return [name for name in names if name in present]

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def parameter_groups(self) -> list[dict]:
        """Groups for the optimiser, each clipped by itself; the first one is what is averaged and saved.

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


def check_not_negative(**noise):
    for name, value in noise.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_stage(stage):
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 or 2, got {stage!r}")
