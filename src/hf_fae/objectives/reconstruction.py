"""The objective of all decoders of images: pixel distance, perceptual distance and a discriminator."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ..losses.gan import AdversarialLoss
from ..utils.randomness import ImageRandom
from .base import Objective


__all__ = ["Reconstruction", "ReconstructionObjective"]


@dataclass
class Reconstruction:
    """The result of `ReconstructionObjective.reconstruct`.

    Attributes:
        images: (B, 3, H, W), about [-1, 1], with their graph.
        discriminator_images: images of that shape that the discriminator learns from; None for `images`.
        terms: further terms of the loss, name -> (weight, scalar); a weight may be a function of the loss without
            adversarial and further terms, and of the scalar.
    """

    images: torch.Tensor
    discriminator_images: torch.Tensor | None = None
    terms: dict[str, tuple[float | Callable, torch.Tensor]] = field(default_factory=dict)


class ReconstructionObjective(Objective):
    """The loss of reconstructed images x_hat against images x, with further terms of the subclass.

        loss = d(x_hat, x) + perceptual_weight * P(x_hat, x) + adversarial terms + sum of weight * term

    A subclass defines `reconstruct` and `last_layer_weight`.

    Args:
        model: the tokenizer.
        trained: names of its parts to train.
        reconstruction_loss: `"l2"` or `"l1"`, the pixel distance d.
        perceptual: a distance P of images, with `perceptual_weight`; None for none.
        adversarial: the adversarial loss, whose discriminator is trained at `discriminator_learning_rate` (by default
            the run's); None for none.

    Raises:
        ValueError: another `reconstruction_loss`.
    """

    pixel_scale = 0.5  # distances are on the [0, 1] scale of pixels, as in the recipes of TiTok, RAE and l-DeTok

    def __init__(
        self,
        model: nn.Module,
        trained: list[str],
        *,
        reconstruction_loss: Literal["l2", "l1"] = "l2",
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        adversarial: AdversarialLoss | None = None,
        discriminator_learning_rate: float | None = None,
    ):
        if reconstruction_loss not in ("l2", "l1"):
            raise ValueError(f"reconstruction_loss must be 'l2' or 'l1', got {reconstruction_loss!r}")
        super().__init__(model, [getattr(model, name) for name in trained])
        self.trained = trained
        self.pixel_distance = F.mse_loss if reconstruction_loss == "l2" else F.l1_loss
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.adversarial, self.discriminator_learning_rate = adversarial, discriminator_learning_rate

    @property
    def last_layer_weight(self) -> nn.Parameter:
        """The weight of the layer that outputs the images, for adaptive weights."""
        raise NotImplementedError

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        """The reconstruction of a batch with "pixel_values" (B, 3, H, W)."""
        raise NotImplementedError

    def compare_pixels(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The pixel distance of images from targets, both (B, 3, H, W) in [-1, 1]: a scalar in fp32."""
        return self.pixel_distance(images.float() * self.pixel_scale, targets.float() * self.pixel_scale)

    def parameter_groups(self) -> list[dict]:
        parts = [getattr(self.model, name) for name in self.trained]
        groups = [{"params": [p for part in parts for p in part.parameters() if p.requires_grad]}]
        if self.adversarial is not None:
            params = [p for p in self.adversarial.parameters() if p.requires_grad]
            groups.append(
                {"params": params, "learning_rate": self.discriminator_learning_rate, "name": "discriminator"}
            )
        return groups

    def before_step(self, step: int) -> None:
        if self.adversarial is not None:
            self.adversarial.before_step(step)

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor]:
        images = batch["pixel_values"]
        output = self.reconstruct(batch, random)
        decoded = output.images.float()
        reconstruction = self.compare_pixels(decoded, images)
        losses = {"loss": reconstruction, "reconstruction": reconstruction}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(decoded, images)
            losses["loss"] = reconstruction + self.perceptual_weight * losses["perceptual"]
        reconstruction_loss = losses["loss"]
        if self.adversarial is not None:
            adversarial = self.adversarial(
                decoded,
                images,
                reconstruction_loss=reconstruction_loss,
                last_layer_weight=self.last_layer_weight,
                random=random,
                discriminator_images=output.discriminator_images,
            )
            losses["loss"] = losses["loss"] + adversarial.pop("loss")
            losses |= {f"adversarial/{name}": value for name, value in adversarial.items()}
        for name, (weight, value) in output.terms.items():
            losses[name] = value
            weight = weight(reconstruction_loss, value) if callable(weight) else weight
            losses["loss"] = losses["loss"] + weight * value
        return losses
