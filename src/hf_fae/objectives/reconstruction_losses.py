"""The losses of a `ReconstructionObjective`, from the arguments of a script."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..losses.diffaugment import DiffAugment
from ..losses.discriminators import NLayerDiscriminator, PatchDiscriminator, TokenDiscriminator
from ..losses.gan import AdversarialLoss
from ..losses.perceptual import load_perceptual


__all__ = ["ReconstructionArguments", "make_losses"]


@dataclass
class ReconstructionArguments:
    """The losses of a decoder."""

    reconstruction_loss: Literal["l2", "l1"] = field(default="l2", metadata={"help": "Pixel distance."})
    perceptual: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Perceptual terms, KIND=WEIGHT or KIND:SOURCE=WEIGHT, combined in a weighted average: lpips, "
            "logits:TIMM_MODEL, features:TIMM_OR_TRANSFORMERS_MODEL."
        },
    )
    perceptual_weight: float = field(default=1.1, metadata={"help": "Weight of the perceptual average."})
    discriminator: Literal["none", "patch", "nlayer", "token"] = field(
        default="none",
        metadata={
            "help": "patch: convolutional (MaskBit); nlayer: pix2pix's, with batch norms; token: heads on a frozen "
            "vision transformer."
        },
    )
    discriminator_model: str = field(
        default="facebook/dino-vits8", metadata={"help": "Frozen network of the token discriminator."}
    )
    discriminator_embeddings: bool = field(
        default=False,
        metadata={"help": "token: put the fifth head on the embeddings instead of, again, on the last layer."},
    )
    discriminator_channels: int = field(default=128, metadata={"help": "Base width of patch and nlayer."})
    discriminator_learning_rate: float | None = field(default=None, metadata={"help": "By default learning_rate."})
    discriminator_start: int = field(default=0, metadata={"help": "First step of the discriminator's training."})
    adversarial_weight: float = field(default=0.1, metadata={"help": "Weight of the adversarial loss."})
    adversarial_start: int | None = field(
        default=None, metadata={"help": "First step with an adversarial loss; none: discriminator_start."}
    )
    adaptive_weight: bool = field(
        default=False, metadata={"help": "Scale the adversarial gradient to that of the other losses."}
    )
    adaptive_eps: float = field(default=1e-6, metadata={"help": "Added to the norm that adaptive_weight divides by."})
    lecam_weight: float = field(default=0.0, metadata={"help": "Weight of the LeCam penalty."})
    diff_augment: bool = field(default=False, metadata={"help": "Augment the discriminator's inputs."})
    cutout: float = field(default=0.0, metadata={"help": "With diff_augment: side of a cut-out square, as a share."})
    consistency_weight: float = field(
        default=0.0, metadata={"help": "Weight of the discriminator's consistency under strong augmentation."}
    )
    grid_images: int = field(default=8, metadata={"help": "Validation images on the sheet of reconstructions."})


def make_losses(args: ReconstructionArguments) -> dict[str, Any]:
    """The arguments of a `ReconstructionObjective` that determine its loss; loads frozen networks.

    Raises:
        ValueError, OSError: as `load_perceptual`, `TokenDiscriminator.from_pretrained` and `AdversarialLoss`.
    """
    return {
        "reconstruction_loss": args.reconstruction_loss,
        "perceptual": load_perceptual(args.perceptual) if args.perceptual else None,
        "perceptual_weight": args.perceptual_weight,
        "adversarial": _make_adversarial_loss(args),
        "discriminator_learning_rate": args.discriminator_learning_rate,
    }


def _make_adversarial_loss(args):
    if args.discriminator == "none":
        return None
    if args.discriminator == "patch":
        discriminator = PatchDiscriminator(args.discriminator_channels)
    elif args.discriminator == "nlayer":
        discriminator = NLayerDiscriminator(args.discriminator_channels)
    else:
        discriminator = TokenDiscriminator.from_pretrained(args.discriminator_model, args.discriminator_embeddings)
    return AdversarialLoss(
        discriminator,
        weight=args.adversarial_weight,
        adaptive=args.adaptive_weight,
        lecam_weight=args.lecam_weight,
        augment=DiffAugment(cutout=args.cutout) if args.diff_augment else None,
        discriminator_start=args.discriminator_start,
        adversarial_start=args.adversarial_start,
        consistency_weight=args.consistency_weight,
        adaptive_eps=args.adaptive_eps,
    )
