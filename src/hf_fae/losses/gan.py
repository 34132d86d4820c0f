"""The adversarial term of a pixel decoder: two discriminators, their losses, and one backward for both networks."""

import torch
from torch import distributed, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..utils.randomness import ImageRandom
from .diffaugment import DiffAugment


__all__ = ["AdversarialLoss", "LeCam", "adaptive_weight", "hinge_loss_discriminator", "hinge_loss_generator"]


def hinge_loss_discriminator(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """(E max(0, 1 - D(x)) + E max(0, 1 + D(G))) / 2 of logits of any shape: 1 where all are zero."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def hinge_loss_generator(fake: torch.Tensor) -> torch.Tensor:
    """-E D(G) of logits of any shape."""
    return -fake.mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor,
    generator_loss: torch.Tensor,
    last_layer_weight: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """|grad of reconstruction_loss| / (|grad of generator_loss| + eps), clamped to [0, 1e4]: a scalar without graph.

    Both gradients are those of `last_layer_weight` (arXiv 2012.09841, eq. 7; eps by default as in RAE), averaged over
    the processes before their norms are taken. The graphs are kept.
    """
    scale = 2.0**16  # in fp16 gradients of means would underflow
    gradients = [
        torch.autograd.grad(scale * loss, last_layer_weight, retain_graph=True)[0]
        for loss in (reconstruction_loss, generator_loss)
    ]
    gradients = _mean_over_processes(torch.stack(gradients).float()) / scale
    reconstruction, generator = gradients.flatten(1).norm(dim=1)
    return (reconstruction / (generator + eps)).clamp(0, 1e4)


def _mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    values = values.detach().clone()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values


class LeCam(nn.Module):
    """Keeps the discriminator's mean logits near the past ones of the other kind (arXiv 2104.03310).

    max(0, E D(x) - a_fake)^2 + max(0, a_real - E D(G))^2 with moving averages a of the mean logits, as TiTok has it:
    one-sided and of means, where the paper's section 3.2 has neither. All means are over all processes.

    Args:
        decay: of the moving averages, which start at 0 and move in training mode only.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """The penalty, a scalar, of logits of any shape; afterwards the averages take these logits in."""
        local = torch.stack([real.float().mean(), fake.float().mean()])
        everywhere = _mean_over_processes(local)
        # The values of all processes with the gradient of one's own: averaged, that is the gradient of the whole.
        real, fake = local + (everywhere - local).detach()
        loss = F.relu(real - self.fake_mean).square() + F.relu(self.real_mean - fake).square()
        if self.training:
            for average, mean in zip((self.real_mean, self.fake_mean), everywhere, strict=True):
                # A step that is not finite is skipped, and must not live on in here.
                average.lerp_(torch.where(torch.isfinite(mean), mean, average), 1 - self.decay)
        return loss


def _round_to_pixels(images):
    """Images (B, 3, H, W) in fp32 without their graph, as 8 bits hold them."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


STRONG_AUGMENT = DiffAugment(cutout=0.5)  # of the consistency: colour, position, holes of half the side, as in SoftVQ


class AdversarialLoss(nn.Module):
    """Both sides of the game as one scalar, whose one backward gives either network its own gradients.

    The generator's term sees the discriminator's parameters as constants, the discriminator's term sees the images
    so: the gradients are those of the usual two steps on the same images. What the discriminator is trained on is
    rounded to 8 bits like the pictures of the data set, so that it cannot tell them by that.

    Spectral norms advance by one power iteration in each call of a discriminator in training mode: two a step, from
    the same weights on every process.

    Args:
        discriminator: images (B, 3, H, W) in [-1, 1] -> logits (B, ...); with an attribute `uses_batch_statistics`
            that is true, each batch of real and of made images has a call of its own.
        weight: of the generator's term (TiTok's recipe 0.1; RAE 0.75 with `adaptive`).
        adaptive: multiply `weight` by `adaptive_weight`.
        lecam_weight: of the `LeCam` penalty on the discriminator (TiTok's recipe 0.001); 0 for none.
        augment: applied to all that the discriminator sees, each time anew; None for nothing.
        discriminator_start, adversarial_start: first steps at which the discriminator is trained and at which the
            generator feels it (RAE: epochs 6 and 8 of 16), the latter by default with the former. Before
            `discriminator_start` no parameter gets a gradient.
        consistency_weight: of the mean squared difference of the discriminator's logits on what it learns from and on
            the same pictures with `STRONG_AUGMENT` (arXiv 2002.04724; SoftVQ and MAETok: 4); 0 for none.
        adaptive_eps: see `adaptive_weight`.

    Raises:
        ValueError: a weight below 0, or an adversarial_start before discriminator_start.
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
        """Switch on what has started by this step of the training: two booleans, which a compiler can rely on."""
        self.discriminator_learns = step >= self.discriminator_start
        self.generator_feels = step >= self.adversarial_start

    def forward(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        reconstruction_loss: torch.Tensor,
        last_layer_weight: torch.Tensor,
        random: ImageRandom,
        shown: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """What to add to the loss, and its parts.

        Args:
            images: the generator's (B, 3, H, W), unclamped, with their graph.
            targets: real images of the same shape in [-1, 1].
            reconstruction_loss: of pixels and perception; used by `adaptive`.
            last_layer_weight: the generator's last layer, from which `images` are computed; used by `adaptive`.
            shown: what the discriminator learns to tell from `targets`; by default `images`. RAE's decoder, which is
                trained with noise, shows what it makes without.

        Returns:
            "loss": to be added to `reconstruction_loss`; 0 before `discriminator_start`. The rest has no graph:
            "generator" and "adaptive_weight" (from `adversarial_start`), "discriminator", "lecam", "consistency",
            "logits_real", "logits_fake" (from `discriminator_start`).
        """
        losses = {"loss": images.new_zeros((), dtype=torch.float32)}
        if self.generator_feels:
            generator = hinge_loss_generator(self._judge_as_constant(images, random))
            weight = self.weight
            if self.adaptive:
                losses["adaptive_weight"] = adaptive_weight(
                    reconstruction_loss, generator, last_layer_weight, self.adaptive_eps
                )
                weight = weight * losses["adaptive_weight"]
            losses["generator"] = generator.detach()
            losses["loss"] = losses["loss"] + weight * generator
        if self.discriminator_learns:
            pictures = [targets.float(), _round_to_pixels(images if shown is None else shown)]
            seen = [self._augment(batch, random) for batch in pictures]
            if self.consistency_weight:
                seen += [STRONG_AUGMENT(batch, random) for batch in pictures]
            real, fake, *strong = self._judge(seen)
            discriminator = hinge_loss_discriminator(real, fake)
            losses["discriminator"] = discriminator.detach()
            losses["loss"] = losses["loss"] + discriminator
            if self.lecam is not None:
                lecam = self.lecam(real, fake)
                losses["lecam"] = lecam.detach()
                losses["loss"] = losses["loss"] + self.lecam_weight * lecam
            if strong:
                consistency = F.mse_loss(torch.cat(strong), torch.cat([real, fake]))
                losses["consistency"] = consistency.detach()
                losses["loss"] = losses["loss"] + self.consistency_weight * consistency
            losses["logits_real"], losses["logits_fake"] = real.detach().mean(), fake.detach().mean()
        return losses

    def _judge_as_constant(self, images, random):
        """Logits that pass gradients to `images` and to no parameter."""
        constants = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return functional_call(self.discriminator, constants, (self._augment(images, random),))

    def _judge(self, batches):
        """Logits of each of some batches, in one call so that all of them see the same spectral norms."""
        if getattr(self.discriminator, "uses_batch_statistics", False):
            return [self.discriminator(batch) for batch in batches]
        return self.discriminator(torch.cat(batches)).chunk(len(batches))

    def _augment(self, images, random):
        return images if self.augment is None else self.augment(images, random)
