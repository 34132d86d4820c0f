"""Stages Ib and II of FAE (arXiv 2512.07829, section 4.2): the pixel decoder, on noisy and then on decoded features.

    accelerate launch training_scripts/train_pixel_decoder.py --config .../fae/pixel_decoder_dinov2_base_ib.yaml
    accelerate launch training_scripts/train_pixel_decoder.py --config .../fae/pixel_decoder_dinov2_base_ii.yaml

`output_dir` becomes the whole `AutoencoderFAE`, with its frozen encoder.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from hf_fae.autoencoders.initialization import add_overlap_head, copy_pixel_decoder, load_trained_fae
from hf_fae.data.feature_cache import FeatureData
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.objectives.fae import PixelObjective
from hf_fae.objectives.reconstruction_losses import ReconstructionArguments, make_losses
from hf_fae.objectives.validation import PixelDecoderValidation
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class PixelDecoderArguments:
    """The FAE whose pixel decoder is trained, and the input of that decoder."""

    fae: str = field(metadata={"help": "AutoencoderFAE after stage Ia (or Ib): Hub id or local folder."})
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), for an FAE saved without it."}
    )
    pixel_decoder: str | None = field(
        default=None,
        metadata={"help": "FAE on the same features, whose pixel decoder is the start; none: that of fae."},
    )
    overlap_head: bool = field(
        default=False, metadata={"help": "Turn a linear pixel head into an overlap head: no seams between patches."}
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Features of the training images, cached by cache_latents.py with an identity FAE."},
    )
    stage: Literal["Ib", "II"] = field(default="Ib", metadata={"help": "Ib: noisy features; II: decoded features."})
    noise_sigma: float = field(default=0.4, metadata={"help": "Stage Ib: noise on standardised features."})
    latent_noise: float = field(
        default=0.0,
        metadata={"help": "Stage II: noise on normalised latents, the noise_sigma of a flow with noisy samples."},
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
    loop.print(data.describe())
    objective = PixelObjective(model, args.stage, args.noise_sigma, args.latent_noise, **losses).to(loop.device)
    validation = PixelDecoderValidation(
        model,
        data.validation_batches(loop_args.train_batch_size),
        loss_args.grid_images,
        latent_noise=args.latent_noise,
        seed=loop_args.seed,
    )
    loop.run(objective, data, validation, save=partial(model.save_pretrained, loop_args.output_dir))


if __name__ == "__main__":
    run(main)
