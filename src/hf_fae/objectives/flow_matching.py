"""Flow matching of a denoiser on latents (SiT, LightningDiT; FAE, arXiv 2512.07829, section 5).

x_t = (1 - t) x + t eps,  v = eps - x,  loss = |v_hat(x_t, t) - v|^2
"""

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..generators.prediction import to_velocity
from ..utils.randomness import ImageRandom
from .base import Mean, check_not_negative
from .generator import GeneratorObjective


__all__ = ["FlowMatchingObjective", "check_timestep_sampling", "dimension_shift", "shift_time"]


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """t' = t / (s + (1 - s) t) for noise times t and the papers' s <= 1: the smaller s, the more noise (section 5.3).

    Equals diffusers' `shift` = 1 / s.
    """
    return t / (shift + (1 - shift) * t)


def dimension_shift(*shape: int) -> float:
    """The papers' s for latents of a shape (C, h, w): s = sqrt(4096 / (C h w)), 0.144 for RAE's 768 x 16 x 16.

    The more dimensions, the more noise it takes to destroy their content (RAE, arXiv 2510.11690, section 4; a = 1 / s
    there). At most 1, for fewer than 4096 dimensions.
    """
    return min(1.0, math.sqrt(4096 / math.prod(shape)))


def check_timestep_sampling(timestep_sampling: str) -> None:
    """Refuse an unknown distribution of noise times.

    Raises:
        ValueError: neither `"uniform"` nor `"logit_normal"`.
    """
    if timestep_sampling not in ("uniform", "logit_normal"):
        raise ValueError(f"timestep_sampling must be 'uniform' or 'logit_normal', got {timestep_sampling!r}")


class FlowMatchingObjective(GeneratorObjective):
    """Mean squared error of the velocity, at one noise time per image.

    x is a sample of the posterior, normalised; t is sampled, then shifted by `shift_time`. The loss is also logged by
    noise time.

    A model whose `config.prediction_type` is `"sample"` predicts x. The loss is that of the velocity that follows, see
    `to_velocity`: the error of x, weighted by 1 / max(t, 0.05)^2 (RAEv2, arXiv 2605.18324). A base head has the same
    loss, which is added.

    Args:
        model: `model(x_t, 1000 t, **condition) -> .sample`.
        vae, label_dropout, condition: as in `GeneratorObjective`.
        shift: s <= 1 of the time shift; 1 for none (FAE: 0.4).
        timestep_sampling: distribution of the noise times before the shift, `"uniform"`, or `"logit_normal"`, the
            sigmoid of standard normal numbers (LightningDiT, arXiv 2501.01423).
        cosine_weight: of one minus the cosine of the predicted and the true velocity, as vectors of channels
            (LightningDiT's second loss, there 1).
        base_weight: of the loss of the base head, for a model with one (RAEv2: 1).

    Raises:
        ValueError: another choice, or numbers out of range.
    """

    time_bins = 10

    def __init__(
        self,
        model: nn.Module,
        vae: nn.Module,
        shift: float = 1.0,
        label_dropout: float = 0.1,
        condition: nn.Module | None = None,
        timestep_sampling: Literal["uniform", "logit_normal"] = "uniform",
        cosine_weight: float = 0.0,
        base_weight: float = 1.0,
    ):
        if not 0 < shift <= 1:
            raise ValueError(f"shift must be in (0, 1], the papers' s and not diffusers' 1 / s, got {shift}")
        check_timestep_sampling(timestep_sampling)
        check_not_negative(cosine_weight=cosine_weight)
        super().__init__(model, vae, label_dropout, condition, base_weight)
        self.shift, self.timestep_sampling, self.cosine_weight = shift, timestep_sampling, cosine_weight
        self.prediction_type = getattr(model.config, "prediction_type", "velocity")

    def sample_timesteps(self, count: int, random: ImageRandom) -> torch.Tensor:
        """Noise times (count,) in [0, 1)."""
        is_uniform = self.timestep_sampling == "uniform"
        return shift_time(random.uniform(count) if is_uniform else random.normal(count).sigmoid(), self.shift)

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor | Mean]:
        latents = self.latents(batch, random)
        t = self.sample_timesteps(len(latents), random)
        noise = random.normal(*latents.shape)
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        # Of clean latents, too, so that the target has the clamp of small times as well.
        clean = noise - latents if self.prediction_type == "velocity" else latents
        target = to_velocity(self.prediction_type, clean, noisy, t)
        velocity, *base = (
            to_velocity(self.prediction_type, prediction, noisy, t)
            for prediction in self.predictions(noisy, 1000 * t, **self.conditioning(batch, random))
        )
        losses = (velocity - target).square().mean(dim=(1, 2, 3))
        loss, logged = losses.mean(), self.mean_by_time(losses.detach(), t)
        if base:
            base_loss = (base[0] - target).square().mean()
            loss, logged["base_loss"] = loss + self.base_weight * base_loss, base_loss.detach()
        if self.cosine_weight:
            distance = 1 - F.cosine_similarity(velocity, target, dim=1).mean()
            loss, logged["cosine_distance"] = loss + self.cosine_weight * distance, distance.detach()
        return {"loss": loss, **logged}

    def mean_by_time(self, losses: torch.Tensor, t: torch.Tensor) -> dict[str, Mean]:
        """The mean of the finite losses (B,) in each of `time_bins` intervals of the noise times (B,)."""
        bins = F.one_hot((t * self.time_bins).long().clamp_max(self.time_bins - 1), self.time_bins).to(losses.dtype)
        finite = torch.isfinite(losses)  # one image's NaN must not reach the other bins
        bins = bins * finite[:, None]
        sums, counts = torch.where(finite, losses, 0.0) @ bins, bins.sum(0)
        means = [Mean(*pair) for pair in zip(sums.unbind(), counts.unbind(), strict=True)]
        return {f"loss_t/{i / self.time_bins:.1f}": mean for i, mean in enumerate(means)}
