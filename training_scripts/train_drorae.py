"""RAE (arXiv 2510.11690), RAEv2 (arXiv 2605.18324) and DRoRAE's three phases (arXiv 2605.10780, section 3.3).

    accelerate launch training_scripts/train_drorae.py --config .../drorae/drorae_dinov2_base_phase1.yaml
    accelerate launch training_scripts/train_drorae.py --config .../drorae/drorae_dinov2_base_phase2.yaml
    accelerate launch training_scripts/train_drorae.py --config .../drorae/drorae_dinov2_base_phase3.yaml

Phase 1 trains a decoder of the last layer's tokens: the result is an RAE. Phase 2 trains a fusion of all layers before
this decoder; it starts from an RAE, also from diffusers' published `AutoencoderRAE`. Phase 3 trains the decoder after
the fusion. `output_dir` becomes an `AutoencoderDRoRAE` with its frozen encoder and the statistics of its latents. With
--layers, phase 1 is all of RAEv2's training: a decoder of the mean of these layers, an `AutoencoderRAEv2`.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from hf_fae import AutoencoderDRoRAE, AutoencoderRAEv2, VisionEncoder
from hf_fae.autoencoders.initialization import add_fusion, load_rae, read_fusion_type
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.statistics import measure_latent_statistics
from hf_fae.objectives.drorae import DRoRAEObjective
from hf_fae.objectives.reconstruction_losses import ReconstructionArguments, make_losses
from hf_fae.objectives.validation import TokenizerValidation
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class DRoRAEArguments:
    """The phase, and the shape of its new parts."""

    phase: Literal[1, 2, 3] = field(default=1, metadata={"help": "1 and 3: the decoder; 2: the fusion."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "AutoencoderDRoRAE or diffusers' AutoencoderRAE (Hub id or folder) to continue from: the result "
            "of the previous phase; in phase 1 none for a new decoder."
        },
    )
    image_encoder: str | None = field(
        default=None,
        metadata={"help": "Frozen encoder (Hub id or folder) of a new tokenizer, or of one saved without it."},
    )
    layers: list[int] = field(
        default_factory=list,
        metadata={"help": "RAEv2: blocks of the encoder, from 0, whose mean a new decoder reads."},
    )
    add_spatial_mean: bool = field(
        default=True, metadata={"help": "RAEv2: add the mean over the tokens of the last of the layers."}
    )
    decoder_noise: float = field(
        default=0.8, metadata={"help": "tau: noise of up to this scale on the decoder's inputs in training."}
    )
    patch_size: int = field(default=16, metadata={"help": "New decoder: image pixels per latent, along each axis."})
    decoder_hidden_size: int = field(default=1152, metadata={"help": "New decoder: width."})
    decoder_num_layers: int = field(default=28, metadata={"help": "New decoder: layers."})
    decoder_num_attention_heads: int = field(default=16, metadata={"help": "New decoder: heads."})
    decoder_intermediate_size: int = field(default=4096, metadata={"help": "New decoder: width of its feed-forward."})
    fusion_layers: int | None = field(
        default=None, metadata={"help": "Phase 2: number of the deepest layers to fuse; none: all."}
    )
    fusion_weight: float = field(default=0.2, metadata={"help": "Phase 2: beta, the share of the fusion."})
    expert_hidden_size: int = field(default=3072, metadata={"help": "Phase 2: width of an expert."})
    expert_activation: str = field(default="gelu", metadata={"help": "Phase 2: gelu, silu or relu."})
    latent_statistics_images: int | None = field(
        default=None, metadata={"help": "Images for the latents' mean and std, at the end; none: the training set."}
    )


def check_arguments(args: DRoRAEArguments, data_args: DataArguments) -> None:
    if args.phase == 1 and args.tokenizer is None and args.image_encoder is None:
        raise ValueError("image_encoder must name the frozen encoder of a new tokenizer, got None")
    if args.layers and (args.phase > 1 or args.tokenizer is not None):
        raise ValueError(f"layers must be given for a new decoder in phase 1 only, got {args.layers}")
    if args.phase > 1 and args.tokenizer is None:
        raise ValueError(f"tokenizer must name the result of phase {args.phase - 1}, got None")
    fusion_type = "none" if args.tokenizer is None else read_fusion_type(args.tokenizer)
    if (args.phase == 3) == (fusion_type == "none"):
        wanted = "a fusion in phase 3" if args.phase == 3 else f"no fusion before phase {args.phase}"
        raise ValueError(f"tokenizer must have {wanted}, got fusion_type {fusion_type!r} in {args.tokenizer!r}")
    if args.phase == 2 and not 0 < args.fusion_weight <= 1:
        raise ValueError(f"fusion_weight must be above 0 and at most 1 to train a fusion, got {args.fusion_weight}")
    if not 0 <= args.decoder_noise < math.inf:
        raise ValueError(f"decoder_noise must be finite and not negative, got {args.decoder_noise}")
    count = args.latent_statistics_images
    if count is None and data_args.streaming and args.phase < 3:
        raise ValueError("latent_statistics_images must be a number for streamed data, got None")
    if count is not None and count < 1:
        raise ValueError(f"latent_statistics_images must be positive, got {count}")


def make_tokenizer(args: DRoRAEArguments, resolution: int) -> AutoencoderDRoRAE | AutoencoderRAEv2:
    """The tokenizer to train, with its frozen encoder."""
    if args.tokenizer is not None:
        model = load_rae(args.tokenizer, args.image_encoder, resolution)
        if args.phase != 2:
            return model
        return add_fusion(
            model,
            args.fusion_layers,
            fusion_weight=args.fusion_weight,
            expert_hidden_size=args.expert_hidden_size,
            expert_activation=args.expert_activation,
        )
    model_class, config = AutoencoderDRoRAE, {"fusion_type": "none"}
    if args.layers:
        model_class, config = AutoencoderRAEv2, {"layers": args.layers, "add_spatial_mean": args.add_spatial_mean}
    return model_class.from_encoder(
        VisionEncoder.from_pretrained(args.image_encoder, dtype=torch.float32),
        sample_size=resolution,
        patch_size=args.patch_size,
        decoder_hidden_size=args.decoder_hidden_size,
        decoder_num_layers=args.decoder_num_layers,
        decoder_num_attention_heads=args.decoder_num_attention_heads,
        decoder_intermediate_size=args.decoder_intermediate_size,
        **config,
    )


def main(argv: list[str] | None = None) -> None:
    args, loss_args, data_args, loop_args, config = parse_arguments(
        DRoRAEArguments, ReconstructionArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    check_arguments(args, data_args)
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = ImageData(data_args, loop_args.seed)
        model = make_tokenizer(args, data_args.resolution)
        losses = make_losses(loss_args)
    trained = "fusion" if args.phase == 2 else "decoder"
    loop.print(data.describe())
    objective = DRoRAEObjective(model, trained, args.decoder_noise, **losses).to(loop.device)
    batch_size, num_workers = loop_args.train_batch_size, loop_args.dataloader_num_workers
    validation = TokenizerValidation(objective, data.validation_batches(batch_size), loss_args.grid_images)

    def save():
        model.eval()
        if args.phase < 3:  # phase 3 does not change the latents
            with loop.accelerator.autocast():
                measure_latent_statistics(model, data, args.latent_statistics_images, batch_size, num_workers)
        model.save_pretrained(loop_args.output_dir)

    loop.run(objective, data, validation, save)


if __name__ == "__main__":
    run(main)
