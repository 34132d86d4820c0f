"""The base of all objectives of generators: a frozen tokenizer's latents and a condition with dropout."""

import torch
from torch import nn

from ..data.conditions import ClassCondition
from ..latents import LatentAutoencoderMixin, encode_images, latent_statistics, normalized_posterior
from ..utils.randomness import ImageRandom
from .base import Objective, check_not_negative, sample_posterior


__all__ = ["GeneratorObjective"]


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
        base_weight: of the loss of a denoiser's base head.
    """

    def __init__(
        self,
        model: nn.Module,
        vae: nn.Module,
        label_dropout: float = 0.1,
        condition: nn.Module | None = None,
        base_weight: float = 1.0,
    ):
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must be from 0 to 1, got {label_dropout}")
        check_not_negative(base_weight=base_weight)
        super().__init__(model, [model])
        self.base_weight = base_weight
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

    def predictions(self, *inputs: torch.Tensor, **condition: torch.Tensor) -> list[torch.Tensor]:
        """The prediction of a denoiser and, where it has one, that of its base head; in fp32."""
        if getattr(self.model.config, "base_head_layer", None) is None:
            return [self.model(*inputs, **condition).sample.float()]
        output = self.model(*inputs, **condition, output_base_sample=True)
        return [output.sample.float(), output.base_sample.float()]

    def conditioning(self, batch: dict, random: ImageRandom) -> dict[str, torch.Tensor]:
        """The model's condition as its keyword arguments; while training some images go without."""
        if not self.training:
            return self.condition(batch)
        size = len(next(iter(batch.values())))
        return self.condition(batch, random.uniform(size) < self.label_dropout)
