"""MAETok (arXiv 2502.03444): a tokenizer trained on masked images, and then its pixel decoder alone.

    accelerate launch training_scripts/train_maetok.py --config training_scripts/configs/maetok/maetok_b_256.yaml
    accelerate launch training_scripts/train_maetok.py \\
        --config training_scripts/configs/maetok/maetok_b_256_decoder.yaml

`output_dir` becomes an `AutoencoderMAETok` with the statistics of its latents. Stage 1 also saves its auxiliary
decoders; stage 2 drops them and starts from the averaged weights of encoder and pixel decoder.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from hf_fae import AutoencoderMAETok
from hf_fae.autoencoders.maetok import CAPTION
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.statistics import measure_latent_statistics
from hf_fae.objectives.maetok import MAETokObjective
from hf_fae.objectives.maetok_targets import load_targets, target_names
from hf_fae.objectives.reconstruction_losses import ReconstructionArguments, make_losses
from hf_fae.objectives.stages import PixelTokenizerArguments, check_stage_arguments, pixel_tokenizer_sizes
from hf_fae.objectives.validation import TokenizerValidation
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class MAETokArguments(PixelTokenizerArguments):
    """The tokenizer, its masks, and the auxiliary targets of stage 1."""

    num_latent_tokens: int = field(default=128, metadata={"help": "Stage 1: latents per image."})
    latent_channels: int = field(default=32, metadata={"help": "Stage 1: channels of the latents."})
    decoder_type: Literal["plain", "modulated"] = field(
        default="plain", metadata={"help": "Stage 1: the paper's blocks, or those of the released weights."}
    )
    rope_type: Literal["axial", "learned"] = field(
        default="axial", metadata={"help": "Stage 1: rotary positions; learned: those of the released weights."}
    )
    rope_theta: float = field(default=100.0, metadata={"help": "Stage 1: their base; 10 in the released weights."})
    min_mask_ratio: float = field(default=0.4, metadata={"help": "Stage 1: smallest share of masked patches."})
    max_mask_ratio: float = field(
        default=0.6, metadata={"help": "Largest share of masked patches, at which stage 2 starts; 0: no masks."}
    )
    mask_std: float = field(
        default=0.25,
        metadata={"help": "Stage 1: std of the truncated normal around the largest share; if large, uniform."},
    )
    mask_scope: Literal["batch", "image"] = field(
        default="batch", metadata={"help": "Stage 1: one share per batch of a process, or per image."}
    )
    mask_steps: int = field(default=50_000, metadata={"help": "Stage 2: steps after which no patch is masked."})
    auxiliary_targets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Stage 1: targets of auxiliary decoders and their weights: hog=WEIGHT, "
            "NAME:ENCODER=WEIGHT (timm or transformers), caption:TOKENIZER=WEIGHT."
        },
    )
    auxiliary_loss: Literal["cosine", "l2"] = field(
        default="cosine", metadata={"help": "Stage 1: for tokens of encoders, 1 - cosine or the squared error."}
    )
    auxiliary_masked_only: bool = field(
        default=True, metadata={"help": "Stage 1: auxiliary losses on masked patches only."}
    )
    auxiliary_hidden_size: int = field(default=192, metadata={"help": "Stage 1: width of auxiliary decoders."})
    auxiliary_num_layers: int = field(default=3, metadata={"help": "Stage 1: layers of auxiliary decoders."})
    auxiliary_num_attention_heads: int = field(default=3, metadata={"help": "Stage 1: heads of auxiliary decoders."})
    caption_length: int = field(default=32, metadata={"help": "Stage 1: predicted tokens per caption."})


def new_tokenizer(args: MAETokArguments, resolution: int, widths: dict[str, int]) -> AutoencoderMAETok:
    """An untrained tokenizer, in stage 1 of the shape of the arguments, with auxiliary decoders of these widths.

    In stage 2 it has the shape of the trained one, without auxiliary decoders.
    """
    if args.stage == 2:
        model = AutoencoderMAETok.from_config(AutoencoderMAETok.load_config(args.tokenizer))
        model.remove_auxiliary_decoders()
        return model
    names = ["num_latent_tokens", "latent_channels", "decoder_type", "rope_type", "rope_theta"]
    names += ["auxiliary_hidden_size", "auxiliary_num_layers", "auxiliary_num_attention_heads"]
    return AutoencoderMAETok(
        **pixel_tokenizer_sizes(args, resolution),
        **{name: getattr(args, name) for name in names},
        auxiliary_targets={name: width for name, width in widths.items() if name != CAPTION} or None,
        caption_vocab_size=widths.get(CAPTION),
        caption_length=args.caption_length if CAPTION in widths else None,
    )


def objective_arguments(args: MAETokArguments) -> dict[str, Any]:
    """The arguments of a `MAETokObjective` that are plain values."""
    return {
        "stage": args.stage,
        "min_mask_ratio": args.min_mask_ratio,
        "max_mask_ratio": args.max_mask_ratio,
        "mask_std": args.mask_std,
        "mask_scope": args.mask_scope,
        "mask_steps": args.mask_steps,
        "masked_targets": args.auxiliary_masked_only,
    }


def check_arguments(args: MAETokArguments, data_args: DataArguments) -> None:
    check_stage_arguments(args, data_args, AutoencoderMAETok)
    names = target_names(args.auxiliary_targets, args.patch_size)
    if CAPTION in names and data_args.caption_column is None:
        raise ValueError(f"caption_column must name the captions for the target {CAPTION}, got None")
    if args.caption_length < 1:
        raise ValueError(f"caption_length must be at least 1, got {args.caption_length}")
    with torch.device("meta"):  # costs nothing, and raises errors before anything is written
        model = new_tokenizer(args, data_args.resolution, dict.fromkeys(names, 1))
        stand_ins = nn.ModuleDict({name: nn.Module() for name in names})
        MAETokObjective(model, targets=stand_ins, **objective_arguments(args))


def main(argv: list[str] | None = None) -> None:
    args, loss_args, data_args, loop_args, config = parse_arguments(
        MAETokArguments, ReconstructionArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    check_arguments(args, data_args)
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = ImageData(data_args, loop_args.seed)
        targets, weights = load_targets(
            args.auxiliary_targets, args.patch_size, args.auxiliary_loss, args.caption_length
        )
        if args.stage == 1:
            widths = {name: target.width for name, target in targets.items()}
            model = new_tokenizer(args, data_args.resolution, widths)
        else:
            model = AutoencoderMAETok.from_pretrained(args.tokenizer).float()
            model.remove_auxiliary_decoders()
        losses = make_losses(loss_args)
    options = {"targets": targets, "target_weights": weights, **objective_arguments(args)}
    loop.print(data.describe())
    objective = MAETokObjective(model, **options, **losses).to(loop.device)
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
