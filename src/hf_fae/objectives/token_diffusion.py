"""The diffusion loss of generators that sample token by token with a diffusion head (MAR, arXiv 2406.11838).

The model embeds the tokens that are given; its head denoises each of the others by the hybrid loss of `ddpm`.
"""

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

    Each token is denoised at `num_noise_samples` timesteps: the head is cheap compared with the rest.

    Args:
        model: a `TokenGenerator`.
        vae, label_dropout, condition: as in `GeneratorObjective`.
        scheduler: of the head; by default that of the papers.
        num_noise_samples: 4 in the papers.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(
        self,
        model: TokenGenerator,
        vae: torch.nn.Module,
        scheduler: DDPMScheduler | None = None,
        num_noise_samples: int = 4,
        label_dropout: float = 0.1,
        condition: torch.nn.Module | None = None,
    ):
        if num_noise_samples < 1:
            raise ValueError(f"num_noise_samples must be at least 1, got {num_noise_samples}")
        super().__init__(model, vae, scheduler or head_scheduler(), label_dropout, condition)
        self.num_noise_samples = num_noise_samples

    def num_targets(self, random: ImageRandom) -> int:
        """How many tokens, at the end of the order, are predicted from this batch."""
        return self.model.num_tokens

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        latents = self.latents(batch, random)
        condition = self.conditioning(batch, random)
        tokens = self.model.to_tokens(latents)
        order = self.model.sample_order(random.uniform(*tokens.shape[:2]))
        count = self.num_targets(random)
        clean = gather_tokens(tokens, order[:, -count:])[:, None]
        timestep = self.sample_timesteps(random, len(tokens), self.num_noise_samples, count)
        noise, per_token = random.normal(*timestep.shape, tokens.shape[-1]), timestep[..., None]
        noisy = add_noise(clean, noise, self.alphas_cumprod[per_token])
        prediction = self.model(latents, noisy, timestep, order=order, **condition).sample
        return self.losses(prediction, clean.expand_as(noise), noise, per_token, dim=-1)


class MARObjective(AutoregressiveObjective):
    """Diffusion loss of masked tokens, given all others (MAR, arXiv 2406.11838).

    The mask ratio, one per batch, is normal with mean 1 and standard deviation 0.25, truncated to
    [`min_mask_ratio`, 1].

    Args:
        min_mask_ratio: 0.7 in the paper.
        args, kwargs: as in `AutoregressiveObjective`.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(self, *args, min_mask_ratio: float = 0.7, **kwargs):
        if not 0 < min_mask_ratio <= 1:
            raise ValueError(f"min_mask_ratio must be in (0, 1], got {min_mask_ratio}")
        super().__init__(*args, **kwargs)
        self.min_mask_ratio = min_mask_ratio

    @torch.compiler.disable  # a number that changes in each step
    def num_targets(self, random: ImageRandom) -> int:
        uniform = torch.tensor(random.of_batch())
        ratio = truncated_normal_mask_ratio(uniform, self.min_mask_ratio, 1.0, center=1.0, std=0.25)
        return math.ceil(self.model.num_tokens * ratio.item())
