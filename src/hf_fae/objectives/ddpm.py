"""DDPM's hybrid loss (arXiv 2102.09672) of models that predict the noise and a variance, such as DiT.

loss = |eps_hat - eps|^2 + variational bound of the variance, without its gradient to eps_hat
"""

import torch
from diffusers import DDPMScheduler

from ..schedulers.learned_variance import add_noise, check_scheduler, hybrid_loss, learned_variance_scheduler
from ..utils.randomness import ImageRandom
from .generator import GeneratorObjective


__all__ = ["DiffusionObjective", "HybridObjective"]


class HybridObjective(GeneratorObjective):
    """The hybrid loss: both terms unscaled, each a mean over elements; both are logged.

    Args:
        model, vae, label_dropout, condition, base_weight: as in `GeneratorObjective`.
        scheduler: defines the noise.

    Raises:
        ValueError: `scheduler` is none of a learned variance.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        vae: torch.nn.Module,
        scheduler: DDPMScheduler,
        label_dropout: float = 0.1,
        condition: torch.nn.Module | None = None,
        base_weight: float = 1.0,
    ):
        super().__init__(model, vae, label_dropout, condition, base_weight)
        check_scheduler(scheduler)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone(), persistent=False)

    def sample_timesteps(self, random: ImageRandom, *shape: int) -> torch.Tensor:
        """Uniform integer timesteps of a shape (B, ...)."""
        return (random.uniform(*shape) * len(self.alphas_cumprod)).long()

    def losses(
        self, prediction: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor, *, dim: int
    ) -> dict[str, torch.Tensor]:
        """The result of `forward`.

        Args:
            prediction: the noise and the variance, concatenated in `dim`.
            clean, noise: of one shape, in fp32.
            timestep: broadcastable to that shape.
        """
        predicted_noise, variance = prediction.float().chunk(2, dim=dim)
        error, bound = hybrid_loss(
            predicted_noise, variance, clean, noise, timestep=timestep, alphas_cumprod=self.alphas_cumprod
        )
        error, bound = error.mean(), bound.mean()
        return {"loss": error + bound, "noise_error": error.detach(), "variational_bound": bound.detach()}


class DiffusionObjective(HybridObjective):
    """The hybrid loss of a denoiser at one timestep per image (DiT, arXiv 2212.09748).

    Args:
        model: `model(x_t, t, **condition) -> .sample`, the noise and its variance.
        vae, label_dropout, condition, base_weight: as in `GeneratorObjective`.
        scheduler: by default DiT's, with linear betas.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        vae: torch.nn.Module,
        scheduler: DDPMScheduler | None = None,
        label_dropout: float = 0.1,
        condition: torch.nn.Module | None = None,
        base_weight: float = 1.0,
    ):
        scheduler = scheduler or learned_variance_scheduler("linear")
        super().__init__(model, vae, scheduler, label_dropout, condition, base_weight=base_weight)

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        latents = self.latents(batch, random)
        condition = self.conditioning(batch, random)
        timestep = self.sample_timesteps(random, len(latents))
        noise, per_image = random.normal(*latents.shape), timestep[:, None, None, None]
        noisy = add_noise(latents, noise, self.alphas_cumprod[per_image])
        prediction, *base = self.predictions(noisy, timestep, **condition)
        losses = self.losses(prediction, latents, noise, per_image, dim=1)
        if base:
            base_loss = self.losses(base[0], latents, noise, per_image, dim=1)["loss"]
            losses |= {"loss": losses["loss"] + self.base_weight * base_loss, "base_loss": base_loss.detach()}
        return losses
