"""Stages Ib and II of FAE (arXiv 2512.07829, section 4.2): the pixel decoder, on noisy and then on decoded features.

    accelerate launch training_scripts/train_pixel_decoder.py --config .../fae/pixel_decoder_dinov2_base_ib.yaml
    accelerate launch training_scripts/train_pixel_decoder.py --config .../fae/pixel_decoder_dinov2_base_ii.yaml

`output_dir` becomes the whole `AutoencoderFAE`, with its frozen encoder.
"""

from dataclasses import dataclass, field
from typing import Literal

from hf_fae.data.feature_cache import FeatureData
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.objectives.base import add_noise
from hf_fae.objectives.fae import PixelObjective
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.reconstruction import ReconstructionArguments, make_losses, validate_reconstructions
from hf_fae.training.tokenizer import add_overlap_head, copy_pixel_decoder, load_trained_fae
from hf_fae.utils.image_metrics import psnr
from hf_fae.utils.parsing import parse_arguments
from hf_fae.utils.randomness import ImageRandom


@dataclass
class PixelDecoderArguments:
    """The tokenizer whose pixel decoder is trained, and on what."""

    fae: str = field(metadata={"help": "AutoencoderFAE after stage Ia (or Ib): Hub id or local folder."})
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), where the FAE comes without it."}
    )
    pixel_decoder: str | None = field(
        default=None,
        metadata={"help": "FAE on the same features, whose pixel decoder to start from; none: that of fae."},
    )
    overlap_head: bool = field(
        default=False, metadata={"help": "Continue a linear pixel head as an overlap head: no seams between patches."}
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


def main(argv: list[str] | None = None) -> None:
    args, loss_args, data_args, loop_args, config = parse_arguments(
        PixelDecoderArguments, ReconstructionArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = ImageData(data_args, loop_args.seed)
        model = load_trained_fae(args.fae, args.image_encoder, data_args.resolution)
        if args.pixel_decoder is not None:
            copy_pixel_decoder(args.pixel_decoder, model)
        if args.overlap_head:
            add_overlap_head(model)
        if args.feature_cache is not None:
            data = FeatureData(data, args.feature_cache, model)
        losses = make_losses(loss_args)
    objective = PixelObjective(model, args.stage, args.noise_sigma, latent_noise=args.latent_noise, **losses)
    objective.to(loop.device)
    loop.print(data.describe())
    validation_batches = list(data.validation_batches(loop_args.train_batch_size))

    def compare(images, first):
        """PSNR of the whole tokenizer, with `latent_noise`, and of the pixel decoder on the encoder's own features."""
        features, grid = model.extract_features(images)
        latents = model.encode_features(features, grid).latent_dist.mode()
        latents = add_noise(latents, args.latent_noise, ImageRandom(loop_args.seed, first, loop.device))
        whole = model.decode(latents).sample
        alone = model.decode_pixels(features, grid).sample
        return whole, {"psnr": psnr(whole, images), "psnr_of_encoder_features": psnr(alone, images)}

    def validate(step):
        return validate_reconstructions(validation_batches, compare, loop.device, loss_args.grid_images)

    loop.run(objective, data, validate, save=lambda: model.save_pretrained(loop_args.output_dir))


if __name__ == "__main__":
    main()
