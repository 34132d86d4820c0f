"""What is minimised by generators that draw token by token: the diffusion loss of their heads (arXiv 2406.11838)."""

import math

import torch
from diffusers import DDPMScheduler

from ..generators.diffusion_head import head_scheduler
from ..generators.token_generator import TokenGenerator, gather_tokens
from ..schedulers.learned_variance import add_noise
from ..utils.randomness import ImageRandom
from .ddpm import HybridObjective
from .masking import truncated_normal_mask_ratio


__all__ = ["AutoregressiveObjective", "MARObjective"]


class AutoregressiveObjective(HybridObjective):
    """Diffusion loss of all tokens, each given those before it (RasterAR, RandomAR of l-DeTok, arXiv 2507.15856).

    Each token gets `noise_draws` times and noises: the head is cheap beside the rest.

    Args:
        model: a `TokenGenerator`.
        vae, label_dropout, condition: as `GeneratorObjective`.
        scheduler: of the head; by default that of the papers.
        noise_draws: 4 in the papers.
    """

    def __init__(
        self,
        model: TokenGenerator,
        vae: torch.nn.Module,
        scheduler: DDPMScheduler | None = None,
        noise_draws: int = 4,
        label_dropout: float = 0.1,
        condition: torch.nn.Module | None = None,
    ):
        if noise_draws < 1:
            raise ValueError(f"noise_draws must be at least 1, got {noise_draws}")
        super().__init__(model, vae, scheduler or head_scheduler(), label_dropout, condition)
        self.noise_draws = noise_draws

    def count_drawn(self, random: ImageRandom) -> int:
        """How many tokens at the end of the order are learned from this batch."""
        return self.model.num_tokens

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        latents = self.latents(batch, random)
        condition = self.conditioning(batch, random)
        tokens = self.model.to_tokens(latents)
        order = self.model.sample_order(random.uniform(*tokens.shape[:2]))
        count = self.count_drawn(random)
        clean = gather_tokens(tokens, order[:, -count:])[:, None]
        timestep = self.draw_times(random, len(tokens), self.noise_draws, count)
        noise, times = random.normal(*timestep.shape, tokens.shape[-1]), timestep[..., None]
        noisy = add_noise(clean, noise, self.alphas_cumprod[times])
        prediction = self.model(latents, noisy, timestep, order=order, **condition).sample
        return self.losses(prediction, clean.expand_as(noise), noise, times, dim=-1)


class MARObjective(AutoregressiveObjective):
    """The same of masked tokens, given all others (MAR, arXiv 2406.11838).

    The share of masked tokens is one for a batch: a normal law with centre 1 and a standard deviation of 0.25, cut to
    [`min_mask_ratio`, 1].

    Args:
        min_mask_ratio: 0.7 in the paper.
    """

    def __init__(self, *args, min_mask_ratio: float = 0.7, **kwargs):
        if not 0 < min_mask_ratio <= 1:
            raise ValueError(f"min_mask_ratio must be in (0, 1], got {min_mask_ratio}")
        super().__init__(*args, **kwargs)
        self.min_mask_ratio = min_mask_ratio

    @torch.compiler.disable  # a number that is another one in each step
    def count_drawn(self, random: ImageRandom) -> int:
        ratio = truncated_normal_mask_ratio(torch.tensor(random.of_batch()), self.min_mask_ratio, 1.0, 1.0, 0.25)
        return math.ceil(self.model.num_tokens * ratio.item())
