"""l-DeTok (arXiv 2507.15856): a tokenizer trained to denoise its latents, and then its decoder alone.

    accelerate launch training_scripts/train_detok.py --config training_scripts/configs/detok/detok_bb.yaml
    accelerate launch training_scripts/train_detok.py --config training_scripts/configs/detok/detok_bb_decoder.yaml

`output_dir` becomes an `AutoencoderDeTok` with the statistics of its latents. Stage 2 starts from the averaged weights
of both halves, which stage 1 saves.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from hf_fae import AutoencoderDeTok
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.statistics import measure_latent_statistics
from hf_fae.objectives.detok import DeTokObjective
from hf_fae.objectives.reconstruction_losses import ReconstructionArguments, make_losses
from hf_fae.objectives.stages import PixelTokenizerArguments, check_stage_arguments, pixel_tokenizer_sizes
from hf_fae.objectives.validation import TokenizerValidation
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class DeTokArguments(PixelTokenizerArguments):
    """The tokenizer, and the noise and masks of stage 1."""

    latent_channels: int = field(default=16, metadata={"help": "Stage 1: channels of the latents."})
    noise_type: Literal["interpolate", "add"] = field(
        default="interpolate", metadata={"help": "Stage 1: (1 - tau) x + tau gamma eps, or x + tau gamma eps."}
    )
    noise_gamma: float = field(default=3.0, metadata={"help": "Stage 1: gamma, the scale of the noise; 0: none."})
    max_mask_ratio: float = field(
        default=0.7, metadata={"help": "Stage 1: M; the share of masked patches is max(0, U(-0.1, M)); 0: none."}
    )
    kl_weight: float = field(
        default=1e-6, metadata={"help": "Stage 1: weight of the KL divergence, a sum over an image's latents."}
    )


def new_tokenizer(args: DeTokArguments, resolution: int) -> AutoencoderDeTok:
    """An untrained tokenizer, of the shape of the arguments in stage 1 and of the trained one in stage 2."""
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
    options = {"stage": args.stage, "max_mask_ratio": args.max_mask_ratio, "kl_weight": args.kl_weight}
    check_stage_arguments(args, data_args, AutoencoderDeTok)
    with torch.device("meta"):  # costs nothing, and raises errors before anything is written
        DeTokObjective(new_tokenizer(args, data_args.resolution), **options)
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = ImageData(data_args, loop_args.seed)
        if args.stage == 1:
            model = new_tokenizer(args, data_args.resolution)
        else:
            model = AutoencoderDeTok.from_pretrained(args.tokenizer).float()
        losses = make_losses(loss_args)
    loop.print(data.describe())
    objective = DeTokObjective(model, **options, **losses).to(loop.device)
    batch_size, num_workers = loop_args.train_batch_size, loop_args.dataloader_num_workers
    validation = TokenizerValidation(objective, data.validation_batches(batch_size), loss_args.grid_images)

    def save():
        model.eval()
        if args.stage == 1:  # stage 2 does not change the latents
            with loop.accelerator.autocast():
                measure_latent_statistics(model, data, args.latent_statistics_images, batch_size, num_workers)
        model.save_pretrained(loop_args.output_dir)

    loop.run(objective, data, validation, save)


if __name__ == "__main__":
    run(main)
