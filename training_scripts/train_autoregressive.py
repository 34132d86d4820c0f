"""A class-conditional generator that samples latents token by token with a diffusion head: MAR (arXiv 2406.11838), or
l-DeTok's RasterAR and RandomAR (arXiv 2507.15856).

    accelerate launch training_scripts/train_autoregressive.py \\
        --config training_scripts/configs/autoregressive/mar_b.yaml

--dataset_name names images or their latents, cached by cache_latents.py. --pipeline continues from a published model
and adds the classes that it does not know. Validation logs the loss on held-out latents.

`output_dir` becomes an `FAEMARPipeline` with the class names; its tokenizer is saved without the frozen encoder, which
is needed only to keep parts of given images.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from hf_fae import AutoregressiveTransformer2DModel, FAEMARPipeline, MARTransformer2DModel
from hf_fae.data.conditions import prepare_condition
from hf_fae.data.images import DataArguments
from hf_fae.data.opening import check_pipeline_arguments, latent_sample_size, open_pipeline, open_training_data
from hf_fae.data.protocol import GeneratorData
from hf_fae.generators.diffusion_head import head_scheduler
from hf_fae.objectives.from_pipeline import objective_of
from hf_fae.objectives.generator import GeneratorArguments
from hf_fae.objectives.validation import GeneratorValidation
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.publish import save_without_encoder
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class AutoregressiveArguments(GeneratorArguments):
    """The tokenizer, the model and its head, and the defaults of the pipeline."""

    model: Literal["mar", "raster", "random"] = field(
        default="mar", metadata={"help": "MAR, RasterAR or RandomAR, for a new pipeline."}
    )
    patch_size: int = field(default=1, metadata={"help": "Latents per token, along each axis."})
    num_layers: int = field(default=12, metadata={"help": "Layers; of MAR in the encoder and in the decoder each."})
    num_attention_heads: int = field(default=12, metadata={"help": "Heads of the model."})
    attention_head_dim: int = field(default=64, metadata={"help": "Width of a head."})
    num_buffer_tokens: int = field(default=64, metadata={"help": "MAR: class tokens in front of the others."})
    dropout: float = field(default=0.1, metadata={"help": "MAR: dropout of attention and of its output."})
    head_num_layers: int = field(default=6, metadata={"help": "Layers of the diffusion head."})
    head_hidden_size: int = field(default=1024, metadata={"help": "Width of the diffusion head."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Default guidance scale of the pipeline."})
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "MAR: default steps of the pipeline; none: one token per step."}
    )
    num_diffusion_steps: int = field(default=100, metadata={"help": "Default steps of the head in the pipeline."})
    timestep_spacing: Literal["linspace", "leading"] = field(
        default="linspace",
        metadata={
            "help": "Spacing of the head's steps: as in the papers, or without the last timestep, for short trainings."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Default temperature of the pipeline."})
    validation_inference_steps: int | None = field(
        default=None, metadata={"help": "MAR: steps of validation samples; none: the pipeline's own."}
    )


def new_pipeline(args: AutoregressiveArguments, data: GeneratorData) -> FAEMARPipeline:
    """A pipeline with an untrained model for the classes of the data."""
    vae = data.load_tokenizer(args.vae, args.image_encoder)
    common = {
        "sample_size": latent_sample_size(data, vae),
        "patch_size": args.patch_size,
        "in_channels": vae.config.latent_channels,
        "num_attention_heads": args.num_attention_heads,
        "attention_head_dim": args.attention_head_dim,
        "head_num_layers": args.head_num_layers,
        "head_hidden_size": args.head_hidden_size,
        "num_classes": len(data.class_names()),
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
                f"{name} must be None for model {args.model!r}, which samples one token per step, got {value}"
            )


def main(argv: list[str] | None = None) -> None:
    args, data_args, loop_args, config = parse_arguments(
        AutoregressiveArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    check_arguments(args)
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = open_training_data(data_args, loop_args.seed)
        if args.pipeline is None:
            pipeline = new_pipeline(args, data)
        else:
            components = {"vae": args.vae, "image_encoder": args.image_encoder}
            pipeline = open_pipeline(data, args.pipeline, FAEMARPipeline, **components)
            check_pipeline_arguments(args, pipeline)
    loop.print(data.describe())
    data, condition = prepare_condition(pipeline, data)
    loop.print(condition.describe())
    pipeline.transformer.tokens_per_step(1, args.validation_inference_steps)  # raises what the validation would
    objective = objective_of(pipeline, condition, args.label_dropout).to(loop.device)
    validation = GeneratorValidation(
        pipeline,
        objective,
        data.validation_batches(loop_args.train_batch_size),
        grid_images=args.grid_images,
        seed=loop_args.seed,
        num_inference_steps=args.validation_inference_steps,
    )
    loop.run(objective, data, validation, save=partial(save_without_encoder, pipeline, loop_args.output_dir))


if __name__ == "__main__":
    run(main)
