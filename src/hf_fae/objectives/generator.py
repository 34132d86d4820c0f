"""The base of all generators' objectives: latents of a frozen tokenizer and a condition with dropout."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..data.captions import CAPTION_LENGTH
from ..data.conditions import ClassCondition
from ..latents import LatentAutoencoderMixin, encode_images, latent_statistics, normalized_posterior
from ..utils.randomness import ImageRandom
from .base import Objective, check_not_negative, sample_posterior


__all__ = ["CaptionArguments", "GeneratorArguments", "GeneratorObjective"]


@dataclass
class GeneratorArguments:
    """What a generator starts from, its label dropout and its validation."""

    vae: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer of hf_fae or AutoencoderKL (Hub id or folder); none: that of the latent cache or "
            "pipeline."
        },
    )
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), for a tokenizer saved without it."}
    )
    pipeline: str | None = field(
        default=None,
        metadata={"help": "Pipeline to continue from (Hub id or folder), instead of a new one of the shape below."},
    )
    label_dropout: float = field(
        default=0.1, metadata={"help": "Share of labels or captions replaced by the null class or the empty text."}
    )
    grid_images: int = field(
        default=16, metadata={"help": "Samples per validation, spread over the classes or its captions."}
    )


@dataclass
class CaptionArguments(GeneratorArguments):
    """The same for text-conditional generators."""

    text_encoder: str | None = field(
        default=None,
        metadata={"help": "Text encoder (Hub id or folder); none: that of the latent cache or pipeline."},
    )
    max_caption_length: int | None = field(
        default=None,
        metadata={"help": f"Tokens per caption; none: as in the latent cache, else {CAPTION_LENGTH}."},
    )


class GeneratorObjective(Objective):
    """A generator on latents of a frozen tokenizer, with a condition that is dropped for some images.

    A batch has images ("pixel_values"), or the posterior moments (B, 2C, h, w) of a latent cache ("moments"), for
    which the tokenizer needs no encoder. The condition determines what else it has.

    Args:
        model: a generator.
        vae: the tokenizer, or diffusers' `AutoencoderKL`.
        label_dropout: share of labels or captions replaced by the null class or the empty text while training; 0 in
            eval mode.
        condition: `TextCondition` or `ClassCondition`; by default the latter, of `model.config.num_classes`.
        base_weight: of the loss of a denoiser's base head.

    Raises:
        ValueError: `label_dropout` or `base_weight` is out of range.
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
        self.repa = None  # see repa.py

    def parameter_groups(self) -> list[dict]:
        groups = super().parameter_groups()
        if self.repa is None:
            return groups
        projector = list(self.repa.projector.parameters())
        of_projector = {id(parameter) for parameter in projector}
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in of_projector]
        return [*groups, {"params": projector, "name": "repa"}]

    @torch.no_grad()
    def latents(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> torch.Tensor:
        """A sample (B, C, h, w) of each image's posterior, normalised, in fp32."""
        if "moments" in batch:
            posterior = normalized_posterior(batch["moments"], *latent_statistics(self.vae))
        elif isinstance(self.vae, LatentAutoencoderMixin):  # `encode` would synchronise with the device to find NaN
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
        """The condition as keyword arguments of the model, dropped for some images while training."""
        if not self.training:
            return self.condition(batch)
        size = len(next(iter(batch.values())))
        return self.condition(batch, random.uniform(size) < self.label_dropout)
