"""What the trainings of decoders share: the arguments of their losses, how they are validated, and the run itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image

from ..data.images import ImageData
from ..data.statistics import measure_latent_statistics, training_images
from ..images import make_grid, to_pil
from ..losses.diffaugment import DiffAugment
from ..losses.discriminators import NLayerDiscriminator, PatchDiscriminator, TokenDiscriminator
from ..losses.gan import AdversarialLoss
from ..losses.perceptual import load_perceptual
from ..objectives.reconstruction import ReconstructionObjective
from ..utils.image_metrics import psnr
from .loop import TrainingLoop


__all__ = ["ReconstructionArguments", "make_losses", "train_tokenizer", "validate_reconstructions"]


@dataclass
class ReconstructionArguments:
    """The losses of a decoder."""

    reconstruction_loss: Literal["l2", "l1"] = field(default="l2", metadata={"help": "Distance of pixels."})
    perceptual: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Perceptual terms, KIND=WEIGHT or KIND:SOURCE=WEIGHT, whose weighted average is taken: lpips, "
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
        metadata={"help": "token: the fifth head is on the embeddings, not again on the last layer."},
    )
    discriminator_channels: int = field(default=128, metadata={"help": "Base width of patch and nlayer."})
    discriminator_learning_rate: float | None = field(default=None, metadata={"help": "By default learning_rate."})
    discriminator_start: int = field(default=0, metadata={"help": "First step at which the discriminator learns."})
    adversarial_weight: float = field(default=0.1, metadata={"help": "Weight of the adversarial loss."})
    adversarial_start: int | None = field(
        default=None, metadata={"help": "First step at which the decoder feels it; none: discriminator_start."}
    )
    adaptive_weight: bool = field(
        default=False, metadata={"help": "Scale the adversarial gradient to that of the other losses."}
    )
    adaptive_eps: float = field(default=1e-6, metadata={"help": "Added to the norm that adaptive_weight divides by."})
    lecam_weight: float = field(default=0.0, metadata={"help": "Weight of the LeCam penalty."})
    diff_augment: bool = field(default=False, metadata={"help": "Augment what the discriminator sees."})
    cutout: float = field(default=0.0, metadata={"help": "With diff_augment: side of a hole in it, as a share."})
    consistency_weight: float = field(
        default=0.0, metadata={"help": "Weight of the difference that holes make to the discriminator."}
    )
    grid_images: int = field(default=8, metadata={"help": "Validation images in the picture of reconstructions."})


def make_losses(args: ReconstructionArguments) -> dict[str, Any]:
    """The arguments of a `ReconstructionObjective` that say what is minimised; frozen networks are loaded.

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
        args.adversarial_weight,
        args.adaptive_weight,
        args.lecam_weight,
        DiffAugment(cutout=args.cutout) if args.diff_augment else None,
        args.discriminator_start,
        args.adversarial_start,
        args.consistency_weight,
        args.adaptive_eps,
    )


def validate_reconstructions(
    batches: list[dict],
    compare: Callable[[torch.Tensor, int], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    device: torch.device,
    grid_images: int,
) -> dict[str, float | Image.Image]:
    """Means over the validation pictures, and a sheet "reconstructions" of the first ones above what became of them.

    Args:
        batches: with "pixel_values" (B, 3, H, W) in [-1, 1].
        compare: called with pictures and the number of the first of them; returns reconstructions of their shape, and
            scalars that are means over these pictures.
        grid_images: how many are shown.
    """
    sums, count, originals, reconstructions = {}, 0, [], []
    for batch in batches:
        images = batch["pixel_values"].to(device)
        reconstructed, numbers = compare(images, count)
        sums = {name: sums.get(name, 0) + value * len(images) for name, value in numbers.items()}
        count += len(images)
        missing = grid_images - len(originals)
        originals += to_pil(images[:missing]) if missing > 0 else []
        reconstructions += to_pil(reconstructed[:missing]) if missing > 0 else []
    means = {name: (value / count).item() for name, value in sums.items()}
    return {**means, "reconstructions": make_grid(originals + reconstructions, columns=len(originals))}


def train_tokenizer(
    loop: TrainingLoop,
    objective: ReconstructionObjective,
    data: ImageData,
    grid_images: int,
    measures_latents: bool,
    statistics_images: int | None,
) -> None:
    """Train, validate by what the tokenizer makes of whole pictures, as in use, and save it.

    Args:
        grid_images: see `validate_reconstructions`.
        measures_latents: whether the statistics of the latents are taken at the end; otherwise they stay as they are.
        statistics_images: from so many training pictures; None for all.
    """
    model = objective.to(loop.device).model
    loop.print(data.describe())
    batch_size = loop.args.train_batch_size
    validation_batches = list(data.validation_batches(batch_size))

    def compare(images, first):
        decoded = model(images).sample
        return decoded, {"psnr": psnr(decoded, images), "reconstruction": objective.compare_pixels(decoded, images)}

    def validate(step):
        return validate_reconstructions(validation_batches, compare, loop.device, grid_images)

    def save():
        model.eval()
        if measures_latents:
            images = training_images(data, statistics_images, batch_size, loop.args.dataloader_num_workers)
            with loop.accelerator.autocast():
                measure_latent_statistics(model, images)
        model.save_pretrained(loop.args.output_dir)

    loop.run(objective, data, validate, save)
