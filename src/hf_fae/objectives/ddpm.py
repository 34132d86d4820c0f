"""What is minimised by models that predict the noise and a variance: DDPM's hybrid loss (arXiv 2102.09672)."""

import torch
from diffusers import DDPMScheduler

from ..schedulers.learned_variance import add_noise, check_scheduler, hybrid_loss, learned_variance_scheduler
from ..utils.randomness import ImageRandom
from .generator import GeneratorObjective


__all__ = ["DiffusionObjective", "HybridObjective"]


class HybridObjective(GeneratorObjective):
    """Squared error of the noise plus the variational bound, unscaled, each a mean over elements; both are logged.

    Args:
        model, vae, label_dropout, condition, base_weight: as `GeneratorObjective`.
        scheduler: whose noise is added.
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

    def draw_times(self, random: ImageRandom, *shape: int) -> torch.Tensor:
        """Times of a shape (B, ...), whole numbers of which all are as likely."""
        return (random.uniform(*shape) * len(self.alphas_cumprod)).long()

    def losses(
        self, prediction: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor, dim: int
    ) -> dict[str, torch.Tensor]:
        """What `forward` returns.

        Args:
            prediction: the noise and, behind it in `dim`, the variance.
            clean, noise: of one shape, in fp32.
            timestep: in a shape that can be broadcast.
        """
        predicted_noise, variance = prediction.float().chunk(2, dim=dim)
        error, bound = hybrid_loss(predicted_noise, variance, clean, noise, timestep, self.alphas_cumprod)
        error, bound = error.mean(), bound.mean()
        return {"loss": error + bound, "noise_error": error.detach(), "variational_bound": bound.detach()}


class DiffusionObjective(HybridObjective):
    """The loss of a denoiser at one time for each image (DiT, arXiv 2212.09748).

    Args:
        model: `model(x_t, t, **condition) -> .sample`, the noise and its variance.
        vae, label_dropout, condition, base_weight: as `GeneratorObjective`.
        scheduler: by default DiT's, of linear betas.
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
        timestep = self.draw_times(random, len(latents))
        noise, times = random.normal(*latents.shape), timestep[:, None, None, None]
        noisy = add_noise(latents, noise, self.alphas_cumprod[times])
        prediction, *base = self.predictions(noisy, timestep, **condition)
        losses = self.losses(prediction, latents, noise, times, dim=1)
        if base:
            base_loss = self.losses(base[0], latents, noise, times, dim=1)["loss"]
            losses |= {"loss": losses["loss"] + self.base_weight * base_loss, "base_loss": base_loss.detach()}
        return losses
