"""What is minimised by a denoiser that predicts the noise: DDPM's hybrid loss (DiT, arXiv 2212.09748)."""

import torch
from diffusers import DDPMScheduler

from ..schedulers.learned_variance import add_noise, check_scheduler, hybrid_loss, learned_variance_scheduler
from .generator_objectives import GeneratorObjective
from .randomness import ImageRandom


__all__ = ["DiffusionObjective"]


class DiffusionObjective(GeneratorObjective):
    """Squared error of the noise plus the variational bound, unscaled, at one uniform time for each image.

    Args:
        model: `model(x_t, t, class_labels) -> .sample`, the noise and its variance; its null class is
            `config.num_classes`.
        vae, label_dropout: as `GeneratorObjective`.
        scheduler: by default DiT's, of linear betas.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        vae: torch.nn.Module,
        scheduler: DDPMScheduler | None = None,
        label_dropout: float = 0.1,
    ):
        super().__init__(model, vae, label_dropout)
        scheduler = learned_variance_scheduler("linear") if scheduler is None else scheduler
        check_scheduler(scheduler)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone(), persistent=False)

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        latents = self.latents(batch, random)
        labels = self.labels(batch, random)
        timestep = (random.uniform(len(latents)) * len(self.alphas_cumprod)).long()
        noise, times = random.normal(*latents.shape), timestep[:, None, None, None]
        noisy = add_noise(latents, noise, self.alphas_cumprod[times])
        predicted_noise, variance = self.model(noisy, timestep, labels).sample.float().chunk(2, dim=1)
        error, bound = hybrid_loss(predicted_noise, variance, latents, noise, times, self.alphas_cumprod)
        error, bound = error.mean(), bound.mean()
        return {"loss": error + bound, "noise_error": error.detach(), "variational_bound": bound.detach()}
