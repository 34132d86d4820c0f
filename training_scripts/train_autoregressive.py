"""A class-conditional model that draws latents token by token: MAR (arXiv 2406.11838), or l-DeTok's RasterAR and
RandomAR (arXiv 2507.15856), all with a diffusion head.

    accelerate launch training_scripts/train_autoregressive.py \\
        --config training_scripts/configs/autoregressive/mar_b.yaml

The data are pictures, or latents that cache_latents.py made of them: --dataset_name names either. With --pipeline a
published model is trained on; classes that it does not know are added. Validation logs the loss on held-out latents.

`output_dir` becomes an `FAEMARPipeline` with the class names; its tokenizer comes without the frozen encoder, which is
needed only to keep parts of pictures.
"""

from dataclasses import dataclass, field
from typing import Literal

from hf_fae import AutoregressiveTransformer2DModel, FAEMARPipeline, MARTransformer2DModel
from hf_fae.data.conditions import ClassCondition
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.latent_cache import CachedLatents
from hf_fae.generators.diffusion_head import head_scheduler
from hf_fae.objectives.token_diffusion import AutoregressiveObjective
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.generation import (
    GeneratorArguments,
    class_names,
    latent_size,
    objective_of,
    open_tokenizer,
    train_generator,
)
from hf_fae.utils.parsing import parse_arguments


@dataclass
class AutoregressiveArguments(GeneratorArguments):
    """The tokenizer, the model and its head, and how the pipeline draws."""

    model: Literal["mar", "raster", "random"] = field(
        default="mar", metadata={"help": "MAR, RasterAR or RandomAR, of a new pipeline."}
    )
    patch_size: int = field(default=1, metadata={"help": "Latents per token, along each axis."})
    num_layers: int = field(default=12, metadata={"help": "Layers; of MAR in the encoder and in the decoder each."})
    num_attention_heads: int = field(default=12, metadata={"help": "Heads of the model."})
    attention_head_dim: int = field(default=64, metadata={"help": "Width of a head."})
    num_buffer_tokens: int = field(default=64, metadata={"help": "MAR: tokens of the class before the others."})
    dropout: float = field(default=0.1, metadata={"help": "MAR: dropout of attention and of its output."})
    head_num_layers: int = field(default=6, metadata={"help": "Layers of the diffusion head."})
    head_hidden_size: int = field(default=1024, metadata={"help": "Width of the diffusion head."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Default guidance scale of the pipeline."})
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "MAR: default steps of the pipeline; none: a token a step."}
    )
    num_diffusion_steps: int = field(default=100, metadata={"help": "Default steps of the head in the pipeline."})
    timestep_spacing: Literal["linspace", "leading"] = field(
        default="linspace",
        metadata={
            "help": "Where the head's steps lie: as in the papers, or without the last time, for short trainings."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Default temperature of the pipeline."})
    validation_inference_steps: int | None = field(
        default=None, metadata={"help": "MAR: steps for the pictures of a validation; none: the pipeline's own."}
    )


def new_pipeline(args: AutoregressiveArguments, data: ImageData | CachedLatents) -> FAEMARPipeline:
    """A pipeline with a fresh model for the classes of the data."""
    vae = open_tokenizer(args.vae, args.image_encoder, data)
    common = {
        "sample_size": latent_size(vae, data),
        "patch_size": args.patch_size,
        "in_channels": vae.config.latent_channels,
        "num_attention_heads": args.num_attention_heads,
        "attention_head_dim": args.attention_head_dim,
        "head_num_layers": args.head_num_layers,
        "head_hidden_size": args.head_hidden_size,
        "num_classes": len(class_names(data)),
    }
    if args.model == "mar":
        transformer = MARTransformer2DModel(
            encoder_num_layers=args.num_layers,
            decoder_num_layers=args.num_layers,
            num_buffer_tokens=args.num_buffer_tokens,
            dropout=args.dropout,
            **common,
        )
    else:
        transformer = AutoregressiveTransformer2DModel(num_layers=args.num_layers, order=args.model, **common)
    return FAEMARPipeline(
        vae,
        transformer,
        head_scheduler(args.timestep_spacing),
        data.id2label,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        num_diffusion_steps=args.num_diffusion_steps,
        temperature=args.temperature,
    )


def check_arguments(args: AutoregressiveArguments) -> None:
    if args.pipeline is not None or args.model == "mar":
        return
    for name in ("num_inference_steps", "validation_inference_steps"):
        if (value := getattr(args, name)) is not None:
            raise ValueError(
                f"{name} must be None for model {args.model!r}, which draws one token a step, got {value}"
            )


def make_objective(
    pipe: FAEMARPipeline, condition: ClassCondition, args: AutoregressiveArguments
) -> AutoregressiveObjective:
    """The loss; refuses steps that a published model cannot take before its first validation does."""
    pipe.transformer.tokens_per_step(1, args.validation_inference_steps)
    return objective_of(pipe, condition, args.label_dropout)


def main(argv: list[str] | None = None) -> None:
    args, *others = parse_arguments(
        AutoregressiveArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    check_arguments(args)
    train_generator(
        args,
        *others,
        FAEMARPipeline,
        lambda data: new_pipeline(args, data),
        lambda pipe, condition: make_objective(pipe, condition, args),
        num_inference_steps=args.validation_inference_steps,
    )


if __name__ == "__main__":
    main()
