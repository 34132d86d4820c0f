"""The adversarial loss of a decoder of images: hinge losses, regularisers, and one backward pass for both networks."""

import torch
from torch import distributed, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..utils.randomness import ImageRandom
from .diffaugment import DiffAugment


__all__ = ["AdversarialLoss", "LeCam", "adaptive_weight", "adversarial_hinge_loss", "discriminator_hinge_loss"]

STRONG_AUGMENT = DiffAugment(cutout=0.5)  # of the consistency: colour, position, holes of half the side, as in SoftVQ


def discriminator_hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(E max(0, 1 - D(x)) + E max(0, 1 + D(x_hat))) / 2 of logits of any shape: 1 where all are zero."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adversarial_hinge_loss(fake: torch.Tensor) -> torch.Tensor:
    """-E D(x_hat) of logits of any shape: the decoder's loss."""
    return -fake.mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor,
    adversarial_loss: torch.Tensor,
    last_layer_weight: torch.Tensor,
    eps: float = 1e-6,
    largest: float = 1e4,
) -> torch.Tensor:
    """|grad of reconstruction_loss| / (|grad of adversarial_loss| + eps), at most `largest`: a scalar without graph.

    Both gradients are those of `last_layer_weight` (arXiv 2012.09841, eq. 7; eps by default as in RAE), averaged over
    the processes before their norms are taken. The graphs are kept.
    """
    scale = 2.0**16  # in fp16 gradients of means would underflow
    gradients = [
        torch.autograd.grad(scale * loss, last_layer_weight, retain_graph=True)[0]
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    gradients = mean_over_processes(torch.stack(gradients).float()) / scale
    reconstruction, adversarial = gradients.flatten(1).norm(dim=1)
    return (reconstruction / (adversarial + eps)).clamp(0, largest)


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The values averaged over all processes, without their graph."""
    values = values.detach().clone()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values


def round_to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in fp32, rounded to 8 bits, without their graph."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


class LeCam(nn.Module):
    """Keeps the discriminator's mean logits near the past ones of the other kind (arXiv 2104.03310).

    max(0, E D(x) - a_fake)^2 + max(0, a_real - E D(x_hat))^2 with moving averages a of the mean logits, as in TiTok:
    one-sided and of means, where the paper's section 3.2 has neither. All means are over all processes.

    Args:
        decay: of the moving averages, which start at 0 and are updated in training mode only.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """The penalty, a scalar, of logits of any shape; updates the averages afterwards."""
        local = torch.stack([real.float().mean(), fake.float().mean()])
        everywhere = mean_over_processes(local)
        # The values of all processes with the local gradient: averaged, that is the gradient of the whole.
        real, fake = local + (everywhere - local).detach()
        loss = F.relu(real - self.fake_mean).square() + F.relu(self.real_mean - fake).square()
        if self.training:
            for average, mean in zip((self.real_mean, self.fake_mean), everywhere, strict=True):
                # A step that is not finite is skipped, and must leave no trace here.
                average.lerp_(torch.where(torch.isfinite(mean), mean, average), 1 - self.decay)
        return loss


class AdversarialLoss(nn.Module):
    """The losses of decoder and discriminator as one scalar, whose single backward pass trains both networks.

    The decoder's loss treats the discriminator's parameters as constants, and the discriminator's loss the images: the
    gradients are those of the usual two steps on the same images. The images that the discriminator learns from are
    rounded to 8 bits like those of the data set, so that rounding does not give them away.

    Spectral norms advance by one power iteration per call of a discriminator in training mode: two per step, from the
    same weights on every process.

    Args:
        discriminator: images (B, 3, H, W) in [-1, 1] -> logits (B, ...). If its attribute `uses_batch_statistics` is
            true, real images and reconstructions are judged in separate calls.
        weight: of the decoder's adversarial loss (TiTok's recipe 0.1; RAE 0.75 with `adaptive`).
        adaptive: multiply `weight` by `adaptive_weight`.
        lecam_weight: of the `LeCam` penalty on the discriminator (TiTok's recipe 0.001); 0 for none.
        augment: applied to all inputs of the discriminator, with new random numbers each time; None for nothing.
        discriminator_start, adversarial_start: first steps of the discriminator's training and of the decoder's
            adversarial loss (RAE: epochs 6 and 8 of 16), the latter by default with the former. Before
            `discriminator_start` no parameter gets a gradient.
        consistency_weight: of the mean squared difference of the discriminator's logits between its inputs and the
            same images with `STRONG_AUGMENT` (arXiv 2002.04724; SoftVQ and MAETok: 4); 0 for none.
        adaptive_eps: see `adaptive_weight`.

    Raises:
        ValueError: a negative weight, or an adversarial_start before discriminator_start.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        weight: float = 0.1,
        adaptive: bool = False,
        lecam_weight: float = 0.0,
        augment: DiffAugment | None = None,
        discriminator_start: int = 0,
        adversarial_start: int | None = None,
        consistency_weight: float = 0.0,
        adaptive_eps: float = 1e-6,
    ):
        weights = {"weight": weight, "lecam_weight": lecam_weight, "consistency_weight": consistency_weight}
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if adversarial_start is None:
            adversarial_start = discriminator_start
        if not 0 <= discriminator_start <= adversarial_start:
            raise ValueError(
                f"adversarial_start must not be before discriminator_start, got {adversarial_start} and "
                f"{discriminator_start}"
            )
        super().__init__()
        self.discriminator, self.weight, self.adaptive, self.augment = discriminator, weight, adaptive, augment
        self.lecam_weight, self.lecam = lecam_weight, LeCam() if lecam_weight else None
        self.consistency_weight, self.adaptive_eps = consistency_weight, adaptive_eps
        self.discriminator_start, self.adversarial_start = discriminator_start, adversarial_start
        self.before_step(0)

    def before_step(self, step: int) -> None:
        """Switch on what has started by this step of the training: two booleans, constant for a compiler."""
        self.trains_discriminator = step >= self.discriminator_start
        self.trains_decoder = step >= self.adversarial_start

    def forward(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        reconstruction_loss: torch.Tensor,
        last_layer_weight: torch.Tensor,
        random: ImageRandom,
        discriminator_images: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """What to add to the loss, and its parts.

        Args:
            images: reconstructions (B, 3, H, W), unclamped, with their graph.
            targets: real images of the same shape in [-1, 1].
            reconstruction_loss: pixel and perceptual loss, for `adaptive`.
            last_layer_weight: of the decoder's last layer, which outputs `images`, for `adaptive`.
            random: numbers of these images.
            discriminator_images: reconstructions that the discriminator learns from; by default `images`. RAE's
                decoder, trained with noise, provides those without noise.

        Returns:
            "loss": to be added to `reconstruction_loss`; 0 before `discriminator_start`. The rest has no graph:
            "decoder" and "adaptive_weight" (from `adversarial_start`), "discriminator", "lecam", "consistency",
            "logits_real", "logits_fake" (from `discriminator_start`).
        """
        losses = {"loss": images.new_zeros((), dtype=torch.float32)}
        if self.trains_decoder:
            adversarial = adversarial_hinge_loss(self._judge_as_constant(images, random))
            weight = self.weight
            if self.adaptive:
                losses["adaptive_weight"] = adaptive_weight(
                    reconstruction_loss, adversarial, last_layer_weight, self.adaptive_eps
                )
                weight = weight * losses["adaptive_weight"]
            losses["decoder"] = adversarial.detach()
            losses["loss"] = losses["loss"] + weight * adversarial
        if self.trains_discriminator:
            fakes = round_to_pixels(images if discriminator_images is None else discriminator_images)
            discriminator = self._discriminator_losses(targets.float(), fakes, random)
            losses["loss"] = losses["loss"] + discriminator.pop("loss")
            losses |= discriminator
        return losses

    def _discriminator_losses(self, reals, fakes, random):
        """The discriminator's "loss", and its parts without graph."""
        inputs = [self._augment(images, random) for images in (reals, fakes)]
        if self.consistency_weight:
            inputs += [STRONG_AUGMENT(images, random) for images in (reals, fakes)]
        real, fake, *strong = self._judge(inputs)
        loss = discriminator_hinge_loss(real, fake)
        losses = {"discriminator": loss.detach()}
        if self.lecam is not None:
            lecam = self.lecam(real, fake)
            losses["lecam"] = lecam.detach()
            loss = loss + self.lecam_weight * lecam
        if strong:
            consistency = F.mse_loss(torch.cat(strong), torch.cat([real, fake]))
            losses["consistency"] = consistency.detach()
            loss = loss + self.consistency_weight * consistency
        losses["logits_real"], losses["logits_fake"] = real.detach().mean(), fake.detach().mean()
        return {"loss": loss, **losses}

    def _judge_as_constant(self, images, random):
        """Logits that pass gradients to `images` and to no parameter."""
        constants = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return functional_call(self.discriminator, constants, (self._augment(images, random),))

    def _judge(self, batches):
        """Logits of several batches, in one call so that all of them see the same spectral norms."""
        if getattr(self.discriminator, "uses_batch_statistics", False):
            return [self.discriminator(batch) for batch in batches]
        return self.discriminator(torch.cat(batches)).chunk(len(batches))

    def _augment(self, images, random):
        return images if self.augment is None else self.augment(images, random)
