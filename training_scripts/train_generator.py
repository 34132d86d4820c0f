"""The class-conditional generator (arXiv 2512.07829, section 5): flow matching of a LightningDiT on latents.

    accelerate launch training_scripts/train_generator.py --config training_scripts/configs/lightningdit_xl.yaml

The data are pictures, or latents that cache_latents.py made of them: --dataset_name names either. With --pipeline a
published generator is trained on; classes that it does not know are added.

`output_dir` becomes an `FAEDiTPipeline` with the class names; its tokenizer comes without the frozen encoder, which
drawing does not need.
"""

from dataclasses import dataclass, field
from typing import Literal

from diffusers import FlowMatchEulerDiscreteScheduler

from hf_fae import FAEDiTPipeline, FlowMatchEulerMaruyamaScheduler, LightningDiTTransformer2DModel
from hf_fae.training.arguments import LoopArguments, parse_arguments
from hf_fae.training.data import DataArguments, ImageData
from hf_fae.training.generation import (
    GeneratorValidation,
    describe_classes,
    latent_size,
    match_classes,
    objective_of,
    open_data,
    open_pipeline,
    open_tokenizer,
    save_without_encoder,
)
from hf_fae.training.latent_cache import CachedLatents
from hf_fae.training.loop import TrainingLoop


@dataclass
class GeneratorArguments:
    """The tokenizer, the denoiser, its loss, and how the pipeline draws."""

    vae: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer, AutoencoderFAE or AutoencoderKL (Hub id or folder); none: that of the latent cache or "
            "pipeline."
        },
    )
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), where the tokenizer comes without it."}
    )
    pipeline: str | None = field(
        default=None,
        metadata={"help": "FAEDiTPipeline to train on (Hub id or folder), instead of a new one of the shape below."},
    )
    patch_size: int = field(default=1, metadata={"help": "Latents per token, along each axis."})
    num_layers: int = field(default=28, metadata={"help": "Layers of the denoiser."})
    num_attention_heads: int = field(default=16, metadata={"help": "Heads of the denoiser."})
    attention_head_dim: int = field(default=72, metadata={"help": "Width of a head."})
    norm_type: Literal["rms_norm", "layer_norm"] = field(default="rms_norm", metadata={"help": "SiT: layer_norm."})
    ff_type: Literal["swiglu", "gelu"] = field(default="swiglu", metadata={"help": "SiT: gelu."})
    use_rope: bool = field(default=True, metadata={"help": "Rotary positions; SiT: false."})
    qk_norm: bool = field(default=False, metadata={"help": "RMSNorm on queries and keys."})
    shift: float = field(default=1.0, metadata={"help": "Time shift s in training and sampling (paper: 0.4)."})
    label_dropout: float = field(default=0.1, metadata={"help": "Share of labels replaced by the null class."})
    sampler: Literal["ode", "sde"] = field(default="ode", metadata={"help": "Euler, or Euler-Maruyama."})
    num_inference_steps: int = field(default=250, metadata={"help": "Default steps of the pipeline."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Default guidance scale of the pipeline."})
    validation_inference_steps: int = field(default=50, metadata={"help": "Steps for the pictures of a validation."})
    grid_images: int = field(default=16, metadata={"help": "Pictures of a validation, spread over the classes."})


def new_pipeline(args: GeneratorArguments, data: ImageData | CachedLatents) -> FAEDiTPipeline:
    """A pipeline with a fresh denoiser for the classes of the data."""
    vae = open_tokenizer(args.vae, args.image_encoder, data)
    transformer = LightningDiTTransformer2DModel(
        sample_size=latent_size(vae, data),
        patch_size=args.patch_size,
        in_channels=vae.config.latent_channels,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        num_classes=len(data.id2label),
        norm_type=args.norm_type,
        ff_type=args.ff_type,
        use_rope=args.use_rope,
        qk_norm=args.qk_norm,
    )
    scheduler_class = {"ode": FlowMatchEulerDiscreteScheduler, "sde": FlowMatchEulerMaruyamaScheduler}[args.sampler]
    pipeline = FAEDiTPipeline(
        vae,
        transformer,
        scheduler_class(shift=1 / args.shift),
        data.id2label,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(argv: list[str] | None = None) -> None:
    args, data_args, loop_args, config = parse_arguments(
        GeneratorArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = open_data(data_args, loop_args.seed)
        if args.pipeline:
            pipeline = open_pipeline(args.pipeline, FAEDiTPipeline, args.vae, args.image_encoder, data)
        else:
            pipeline = new_pipeline(args, data)
    loop.print(data.describe())
    data, names, new_classes = match_classes(pipeline, data)
    loop.print(describe_classes(names, new_classes))
    pipeline.to(loop.device)
    objective = objective_of(pipeline, args.label_dropout)
    validate = GeneratorValidation(
        pipeline,
        objective,
        list(data.validation_batches(loop_args.train_batch_size)),
        names,
        args.grid_images,
        loop_args.seed,
        num_inference_steps=args.validation_inference_steps,
    )
    loop.run(objective, data, validate, save=lambda: save_without_encoder(pipeline, loop_args.output_dir))


if __name__ == "__main__":
    main()
