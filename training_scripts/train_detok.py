"""l-DeTok (arXiv 2507.15856): a tokenizer that learns to repair its latents, and then its decoder alone.

    accelerate launch training_scripts/train_detok.py --config training_scripts/configs/detok/detok_bb.yaml
    accelerate launch training_scripts/train_detok.py --config training_scripts/configs/detok/detok_bb_decoder.yaml

`output_dir` becomes an `AutoencoderDeTok` with the statistics of its latents. Stage 2 starts from the averaged weights
of both halves, which are what stage 1 saves.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from hf_fae import AutoencoderDeTok
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.objectives.detok import DeTokObjective
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.pixel_tokenizer import PixelTokenizerArguments, check_pixel_tokenizer, pixel_tokenizer_sizes
from hf_fae.training.reconstruction import ReconstructionArguments, make_losses, train_tokenizer
from hf_fae.utils.parsing import parse_arguments


@dataclass
class DeTokArguments(PixelTokenizerArguments):
    """The tokenizer, and what is done to its latents in stage 1."""

    latent_channels: int = field(default=16, metadata={"help": "Stage 1: channels of the latents."})
    noise_type: Literal["interpolate", "add"] = field(
        default="interpolate", metadata={"help": "Stage 1: (1 - tau) x + tau gamma eps, or x + tau gamma eps."}
    )
    noise_gamma: float = field(default=3.0, metadata={"help": "Stage 1: gamma, the scale of the noise; 0: none."})
    max_mask_ratio: float = field(
        default=0.7, metadata={"help": "Stage 1: M; the share of hidden patches is max(0, U(-0.1, M)); 0: none."}
    )
    kl_weight: float = field(
        default=1e-6, metadata={"help": "Stage 1: weight of the KL divergence, a sum over an image's latents."}
    )


def new_tokenizer(args: DeTokArguments, resolution: int) -> AutoencoderDeTok:
    """An untrained one of the shape of the arguments, in stage 2 of that of the trained one."""
    if args.stage == 2:
        return AutoencoderDeTok.from_config(AutoencoderDeTok.load_config(args.tokenizer))
    return AutoencoderDeTok(
        **pixel_tokenizer_sizes(args, resolution),
        latent_channels=args.latent_channels,
        noise_type=args.noise_type,
        noise_gamma=args.noise_gamma,
    )


def main(argv: list[str] | None = None) -> None:
    args, loss_args, data_args, loop_args, config = parse_arguments(
        DeTokArguments, ReconstructionArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    training = {"stage": args.stage, "max_mask_ratio": args.max_mask_ratio, "kl_weight": args.kl_weight}
    check_pixel_tokenizer(args, data_args, AutoencoderDeTok)
    with torch.device("meta"):  # costs nothing, and refuses what is out of range before anything is written
        DeTokObjective(new_tokenizer(args, data_args.resolution), **training)
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = ImageData(data_args, loop_args.seed)
        if args.stage == 1:
            model = new_tokenizer(args, data_args.resolution)
        else:
            model = AutoencoderDeTok.from_pretrained(args.tokenizer).float()
        losses = make_losses(loss_args)
    objective = DeTokObjective(model, **training, **losses)
    # Stage 2 leaves the latents as they are.
    train_tokenizer(loop, objective, data, loss_args.grid_images, args.stage == 1, args.latent_statistics_images)


if __name__ == "__main__":
    main()
