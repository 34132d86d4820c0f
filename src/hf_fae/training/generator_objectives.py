"""What generators on a frozen tokenizer's latents minimise: flow matching, and the likelihood of a STARFlow."""

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..latents import LatentAutoencoderMixin, encode_images, latent_statistics, normalized_posterior
from .conditions import ClassCondition
from .objectives import Objective, add_noise, sample_posterior
from .randomness import ImageRandom


__all__ = [
    "FlowMatchingObjective",
    "GeneratorObjective",
    "STARFlowObjective",
    "dimension_shift",
    "shift_time",
]


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """t' = t / (s + (1 - s) t) for noise times t and the papers' s <= 1: more noise the smaller s (section 5.3).

    The same as diffusers' `shift` = 1 / s.
    """
    return t / (shift + (1 - shift) * t)


def dimension_shift(*shape: int) -> float:
    """The papers' s for latents of a shape (C, h, w): s = sqrt(4096 / (C h w)), 0.144 for RAE's 768 x 16 x 16.

    The more numbers, the more noise it takes to hide them (RAE, arXiv 2510.11690, section 4; a = 1 / s there). Never
    above 1, for fewer than 4096 numbers.
    """
    return min(1.0, math.sqrt(4096 / math.prod(shape)))


class GeneratorObjective(Objective):
    """What generators of latents share: a frozen tokenizer, and a condition that some images go without.

    A batch has images ("pixel_values"), or the posterior moments (B, 2C, h, w) of a latent cache ("moments"); then the
    tokenizer needs no encoder. What else it has is up to the condition.

    Args:
        model: a generator.
        vae: the tokenizer, or diffusers' `AutoencoderKL`.
        label_dropout: share of labels or captions that become the null class or the empty text while training; none do
            in eval mode.
        condition: `TextCondition` or `ClassCondition`; by default the latter, of `model.config.num_classes`.
    """

    def __init__(
        self, model: nn.Module, vae: nn.Module, label_dropout: float = 0.1, condition: nn.Module | None = None
    ):
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must be from 0 to 1, got {label_dropout}")
        super().__init__(model, [model])
        self.vae = vae.requires_grad_(False)
        self.label_dropout = label_dropout
        self.condition = ClassCondition(model.config.num_classes) if condition is None else condition

    @torch.no_grad()
    def latents(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> torch.Tensor:
        """A sample (B, C, h, w) of the posterior of each image, normalised, in fp32."""
        if "moments" in batch:
            posterior = normalized_posterior(batch["moments"], *latent_statistics(self.vae))
        elif isinstance(self.vae, LatentAutoencoderMixin):  # `encode` would wait for the device to look for NaN
            posterior = self.vae.posterior(batch["pixel_values"])
        else:
            posterior = encode_images(self.vae, batch["pixel_values"])
        return sample_posterior(posterior, random).float()

    def conditioning(self, batch: dict, random: ImageRandom) -> dict[str, torch.Tensor]:
        """The model's condition as its keyword arguments; while training some images go without."""
        if not self.training:
            return self.condition(batch)
        size = len(next(iter(batch.values())))
        return self.condition(batch, random.uniform(size) < self.label_dropout)


class FlowMatchingObjective(GeneratorObjective):
    """Flow matching of a denoiser on a frozen tokenizer's latents (FAE, section 5).

    x_t = (1 - t) x + t eps, target eps - x, plain MSE; t is uniform, then shifted by `shift_time`; x is a sample of
    the posterior, normalised. The loss is logged by noise time as well.

    Args:
        model: `model(x_t, 1000 t, **condition) -> .sample`.
        vae, label_dropout, condition: as `GeneratorObjective`.
        shift: s <= 1 of the time shift; 1 for none (paper: 0.4).
        timestep_sampling: law of the noise times before the shift, `"uniform"`, or `"logit_normal"`, the sigmoid of
            standard normal numbers (LightningDiT, arXiv 2501.01423).
        cosine_weight: of one minus the cosine of the predicted and the true velocity, as vectors of channels
            (LightningDiT's second loss, there 1).

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
    ):
        if not 0 < shift <= 1:
            raise ValueError(f"shift must be in (0, 1], the papers' s and not diffusers' 1 / s, got {shift}")
        if timestep_sampling not in ("uniform", "logit_normal"):
            raise ValueError(f"timestep_sampling must be 'uniform' or 'logit_normal', got {timestep_sampling!r}")
        if not 0 <= cosine_weight < math.inf:
            raise ValueError(f"cosine_weight must be finite and not negative, got {cosine_weight}")
        super().__init__(model, vae, label_dropout, condition)
        self.shift, self.timestep_sampling, self.cosine_weight = shift, timestep_sampling, cosine_weight

    def draw_times(self, count: int, random: ImageRandom) -> torch.Tensor:
        """Noise times (count,) in [0, 1)."""
        is_uniform = self.timestep_sampling == "uniform"
        return shift_time(random.uniform(count) if is_uniform else random.normal(count).sigmoid(), self.shift)

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        latents = self.latents(batch, random)
        t = self.draw_times(len(latents), random)
        noise = random.normal(*latents.shape)
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        velocity = self.model(noisy, 1000 * t, **self.conditioning(batch, random)).sample.float()
        losses = (velocity - (noise - latents)).square().mean(dim=(1, 2, 3))
        logged = self._by_time(losses.detach(), t)
        if self.cosine_weight == 0:
            return {"loss": losses.mean(), **logged}
        distance = 1 - F.cosine_similarity(velocity, noise - latents, dim=1).mean()
        loss = losses.mean() + self.cosine_weight * distance
        return {"loss": loss, "cosine_distance": distance.detach(), **logged}

    def _by_time(self, losses: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sum and count of the losses in each interval of noise times."""
        bins = F.one_hot((t * self.time_bins).long().clamp_max(self.time_bins - 1), self.time_bins).to(losses.dtype)
        finite = torch.isfinite(losses)  # one image's NaN must not reach the other bins
        bins = bins * finite[:, None]
        table = torch.stack([torch.where(finite, losses, 0.0) @ bins, bins.sum(0)], dim=1)
        return {f"loss_t/{i / self.time_bins:.1f}": pair for i, pair in enumerate(table.unbind())}


class STARFlowObjective(GeneratorObjective):
    """Maximum likelihood of a flow on noisy latents (STARFlow, arXiv 2506.06276, section 3).

    The loss is the mean over elements of -log p(x + noise_sigma * eps), without the prior's constant, plus
    `latent_norm_weight` times the mean square of what each block reads, summed over blocks. "bits_per_dim" is the
    negative log-likelihood of the noisy, normalised latents with its constant, in bits for each of their elements.

    Args:
        model: `STARFlowTransformer2DModel`; its `config.noise_sigma` is the noise.
        vae, label_dropout, condition: as `GeneratorObjective`.
        latent_norm_weight: 1e-4 in the paper's code.
    """

    def __init__(
        self,
        model: nn.Module,
        vae: nn.Module,
        latent_norm_weight: float = 1e-4,
        label_dropout: float = 0.1,
        condition: nn.Module | None = None,
    ):
        if not 0 <= latent_norm_weight < math.inf:
            raise ValueError(f"latent_norm_weight must be finite and not negative, got {latent_norm_weight}")
        super().__init__(model, vae, label_dropout, condition)
        self.latent_norm_weight = latent_norm_weight

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        latents = self.latents(batch, random)
        noisy = add_noise(latents, self.model.config.noise_sigma, random)
        output = self.model(noisy, **self.conditioning(batch, random), output_block_inputs=True)
        nats_per_dim = -output.log_prob().mean() / latents[0].numel()
        latent_norm = torch.stack([tokens.square().mean() for tokens in output.block_inputs]).sum()
        nll = nats_per_dim - 0.5 * math.log(2 * math.pi)
        return {
            "loss": nll + self.latent_norm_weight * latent_norm,
            "bits_per_dim": nats_per_dim.detach() / math.log(2),
            "latent_norm": latent_norm.detach(),
        }
