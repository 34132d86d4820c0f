"""Stages Ib and II of FAE (arXiv 2512.07829, section 4.2): the pixel decoder, on noisy and then on decoded features.

    accelerate launch training_scripts/train_pixel_decoder.py --config .../pixel_decoder_dinov2_base_ib.yaml
    accelerate launch training_scripts/train_pixel_decoder.py --config .../pixel_decoder_dinov2_base_ii.yaml

`output_dir` becomes the whole `AutoencoderFAE`, with its frozen encoder.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from hf_fae.evaluation.reconstruction import psnr
from hf_fae.images import make_grid, to_pil
from hf_fae.training.adversarial import AdversarialLoss, PatchDiscriminator, TokenDiscriminator
from hf_fae.training.arguments import LoopArguments, parse_arguments
from hf_fae.training.augmentation import DiffAugment
from hf_fae.training.data import DataArguments, ImageData
from hf_fae.training.feature_cache import FeatureData
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.objectives import PixelObjective, add_noise
from hf_fae.training.perceptual import load_perceptual
from hf_fae.training.randomness import ImageRandom
from hf_fae.training.tokenizer import copy_pixel_decoder, load_trained_fae


@dataclass
class PixelDecoderArguments:
    """The tokenizer whose pixel decoder is trained, and the loss."""

    fae: str = field(metadata={"help": "AutoencoderFAE after stage Ia (or Ib): Hub id or local folder."})
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), where the FAE comes without it."}
    )
    pixel_decoder: str | None = field(
        default=None,
        metadata={"help": "FAE on the same features, whose pixel decoder to start from; none: that of fae."},
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Features of the training pictures, which cache_latents.py made with an identity FAE."},
    )
    stage: Literal["Ib", "II"] = field(default="Ib", metadata={"help": "Ib: noisy features; II: decoded features."})
    noise_sigma: float = field(default=0.4, metadata={"help": "Stage Ib: noise on standardised features."})
    latent_noise: float = field(
        default=0.0,
        metadata={"help": "Stage II: noise on normalised latents, the noise_sigma of a flow whose samples have it."},
    )
    reconstruction_loss: Literal["l2", "l1"] = field(default="l2", metadata={"help": "Distance of pixels."})
    perceptual: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Perceptual terms, KIND=WEIGHT or KIND:SOURCE=WEIGHT, whose weighted average is taken: lpips, "
            "logits:TIMM_MODEL, features:TIMM_OR_TRANSFORMERS_MODEL."
        },
    )
    perceptual_weight: float = field(default=1.1, metadata={"help": "Weight of the perceptual average."})
    discriminator: Literal["none", "patch", "token"] = field(
        default="none", metadata={"help": "patch: convolutional; token: heads on a frozen vision transformer."}
    )
    discriminator_model: str = field(
        default="facebook/dino-vits8", metadata={"help": "Frozen network of the token discriminator."}
    )
    discriminator_channels: int = field(default=128, metadata={"help": "Base width of the patch discriminator."})
    discriminator_learning_rate: float | None = field(default=None, metadata={"help": "By default learning_rate."})
    discriminator_start: int = field(default=0, metadata={"help": "First step at which the discriminator learns."})
    adversarial_weight: float = field(default=0.1, metadata={"help": "Weight of the adversarial loss."})
    adversarial_start: int | None = field(
        default=None, metadata={"help": "First step at which the decoder feels it; none: discriminator_start."}
    )
    adaptive_weight: bool = field(
        default=False, metadata={"help": "Scale the adversarial gradient to that of the other losses."}
    )
    lecam_weight: float = field(default=0.0, metadata={"help": "Weight of the LeCam penalty."})
    diff_augment: bool = field(default=False, metadata={"help": "Augment what the discriminator sees."})
    grid_images: int = field(default=8, metadata={"help": "Validation images in the picture of reconstructions."})


def make_adversarial_loss(args: PixelDecoderArguments) -> AdversarialLoss | None:
    if args.discriminator == "none":
        return None
    if args.discriminator == "patch":
        discriminator = PatchDiscriminator(args.discriminator_channels)
    else:
        discriminator = TokenDiscriminator.from_pretrained(args.discriminator_model)
    return AdversarialLoss(
        discriminator,
        args.adversarial_weight,
        args.adaptive_weight,
        args.lecam_weight,
        DiffAugment() if args.diff_augment else None,
        args.discriminator_start,
        args.adversarial_start,
    )


def main(argv: list[str] | None = None) -> None:
    args, data_args, loop_args, config = parse_arguments(
        PixelDecoderArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = ImageData(data_args, loop_args.seed)
        model = load_trained_fae(args.fae, args.image_encoder, data_args.resolution)
        if args.pixel_decoder is not None:
            copy_pixel_decoder(args.pixel_decoder, model)
        if args.feature_cache is not None:
            data = FeatureData(data, args.feature_cache, model)
        perceptual = load_perceptual(args.perceptual) if args.perceptual else None
        adversarial = make_adversarial_loss(args)
    objective = PixelObjective(
        model,
        args.stage,
        args.noise_sigma,
        args.reconstruction_loss,
        perceptual,
        args.perceptual_weight,
        adversarial,
        args.discriminator_learning_rate,
        args.latent_noise,
    ).to(loop.device)
    loop.print(data.describe())
    validation_batches = list(data.validation_batches(loop_args.train_batch_size))

    def validate(step):
        """PSNR of the whole tokenizer, with `latent_noise`, and of the pixel decoder on the encoder's own features."""
        sums, count, originals, reconstructions = torch.zeros(2, device=loop.device), 0, [], []
        for batch in validation_batches:
            images = batch["pixel_values"].to(loop.device)
            features, grid = model.extract_features(images)
            latents = model.encode_features(features, grid).latent_dist.mode()
            latents = add_noise(latents, args.latent_noise, ImageRandom(loop_args.seed, count, loop.device))
            whole = model.decode(latents).sample
            alone = model.decode_pixels(features, grid).sample
            sums += torch.stack([psnr(whole, images), psnr(alone, images)]) * len(images)
            count += len(images)
            missing = args.grid_images - len(originals)
            originals += to_pil(images[:missing]) if missing > 0 else []
            reconstructions += to_pil(whole[:missing]) if missing > 0 else []
        whole, alone = (sums / count).tolist()
        picture = make_grid(originals + reconstructions, columns=len(originals))
        return {"psnr": whole, "psnr_of_encoder_features": alone, "reconstructions": picture}

    loop.run(objective, data, validate, save=lambda: model.save_pretrained(loop_args.output_dir))


if __name__ == "__main__":
    main()
