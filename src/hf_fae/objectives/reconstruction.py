"""The objective of all decoders of images: pixel distance, perceptual loss and a discriminator."""

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
    """What `ReconstructionObjective.reconstruct` gives.

    Attributes:
        images: (B, 3, H, W), about [-1, 1], with their graph.
        shown: others of that shape that the discriminator learns from; None for `images`.
        terms: further terms of the loss, name -> (weight, scalar).
    """

    images: torch.Tensor
    shown: torch.Tensor | None = None
    terms: dict[str, tuple[float, torch.Tensor]] = field(default_factory=dict)


class ReconstructionObjective(Objective):
    """What trainings on images share: the distance of pixels, of perception, and the game with a discriminator.

    A subclass says how images are reconstructed, by `reconstruct`, and by which layer in the end, `last_layer_weight`.

    Args:
        model: the tokenizer.
        trained: the names of its parts to train.
        reconstruction_loss: `"l2"` or `"l1"`.
        perceptual: a distance of images, with `perceptual_weight`; None for none.
        adversarial: the game with a discriminator, which is trained as well, at `discriminator_learning_rate` (by
            default the run's); None for none.
    """

    pixel_scale = 0.5  # distances are on the [0, 1] scale of pixels, as in the recipes of TiTok, RAE and l-DeTok

    def __init__(
        self,
        model: nn.Module,
        trained: list[str],
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
        """Of the layer that makes the images, for adaptive weights."""
        raise NotImplementedError

    def reconstruct(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> Reconstruction:
        raise NotImplementedError

    def compare_pixels(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The distance of images from targets, both (B, 3, H, W) in [-1, 1]: a scalar in fp32."""
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
        made = self.reconstruct(batch, random)
        decoded = made.images.float()
        reconstruction = self.compare_pixels(decoded, images)
        losses = {"loss": reconstruction, "reconstruction": reconstruction}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(decoded, images)
            losses["loss"] = reconstruction + self.perceptual_weight * losses["perceptual"]
        if self.adversarial is not None:
            game = self.adversarial(decoded, images, losses["loss"], self.last_layer_weight, random, made.shown)
            losses["loss"] = losses["loss"] + game.pop("loss")
            losses |= {f"adversarial/{name}": value for name, value in game.items()}
        for name, (weight, value) in made.terms.items():
            losses[name] = value
            losses["loss"] = losses["loss"] + weight * value
        return losses
