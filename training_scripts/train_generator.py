"""The class-conditional generator (arXiv 2512.07829, section 5): flow matching of a LightningDiT on an FAE's latents.

    accelerate launch training_scripts/train_generator.py --config training_scripts/configs/lightningdit_xl.yaml

The data are pictures, or latents that cache_latents.py made of them: --dataset_name names either. With --pipeline a
published generator is trained on; classes that it does not know are added.

`output_dir` becomes an `FAEDiTPipeline` with the class names; its tokenizer comes without the frozen encoder, which
drawing does not need.
"""

from dataclasses import dataclass, field
from typing import Literal

from diffusers import FlowMatchEulerDiscreteScheduler

from hf_fae import (
    AutoencoderFAE,
    FAEDiTPipeline,
    FlowMatchEulerMaruyamaScheduler,
    LightningDiTTransformer2DModel,
)
from hf_fae.training.arguments import LoopArguments, parse_arguments
from hf_fae.training.data import DataArguments, ImageData
from hf_fae.training.generation import (
    GeneratorValidation,
    describe_classes,
    load_trained_pipeline,
    match_classes,
)
from hf_fae.training.latent_cache import CachedLatents, is_latent_cache
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.objectives import FlowMatchingObjective
from hf_fae.training.tokenizer import complete_tokenizer, load_trained_fae


@dataclass
class GeneratorArguments:
    """The tokenizer, the denoiser, its loss, and how the pipeline draws."""

    fae: str | None = field(
        default=None,
        metadata={"help": "Trained AutoencoderFAE (Hub id or folder); none: that of the latent cache or pipeline."},
    )
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), where the FAE comes without it."}
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


def open_data(args: DataArguments, seed: int) -> ImageData | CachedLatents:
    """The latents or the pictures that `dataset_name` names.

    Raises:
        ValueError: pictures without classes.
    """
    if is_latent_cache(args.dataset_name):
        return CachedLatents.from_arguments(args, seed)
    if args.label_column is None:
        raise ValueError("label_column must name the column of the classes, got None")
    return ImageData(args, seed)


def load_tokenizer(args: GeneratorArguments, data: ImageData | CachedLatents) -> AutoencoderFAE:
    """The tokenizer, in fp32; with its frozen encoder where pictures are to be encoded."""
    if isinstance(data, ImageData):
        return load_trained_fae(args.fae, args.image_encoder, data.args.resolution)
    return AutoencoderFAE.from_pretrained(args.fae or data.folder / "tokenizer", image_encoder=None).float()


def new_pipeline(args: GeneratorArguments, data: ImageData | CachedLatents) -> FAEDiTPipeline:
    """A pipeline with a fresh denoiser for the classes of the data."""
    if args.fae is None and isinstance(data, ImageData):
        raise ValueError("fae must name the tokenizer for training on pictures, got None")
    vae = load_tokenizer(args, data)
    transformer = LightningDiTTransformer2DModel(
        sample_size=vae.config.sample_size // vae.spatial_compression_ratio,
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


def trained_pipeline(args: GeneratorArguments, data: ImageData | CachedLatents) -> FAEDiTPipeline:
    """The pipeline to train on, with its own tokenizer."""
    if args.fae is not None:
        raise ValueError(f"fae must be None with pipeline, which has its own tokenizer, got {args.fae!r}")
    pipeline = load_trained_pipeline(args.pipeline)
    if isinstance(data, ImageData):
        complete_tokenizer(pipeline.vae, args.image_encoder, data.args.resolution)
    return pipeline


def main(argv: list[str] | None = None) -> None:
    args, data_args, loop_args, config = parse_arguments(
        GeneratorArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = open_data(data_args, loop_args.seed)
        pipeline = trained_pipeline(args, data) if args.pipeline else new_pipeline(args, data)
    loop.print(data.describe())
    if isinstance(data, CachedLatents):
        data.check_tokenizer(pipeline.vae)
    data, names, new_classes = match_classes(pipeline, data)
    loop.print(describe_classes(names, new_classes))
    pipeline.to(loop.device)
    # The scheduler's shift is 1 / s of the objective's.
    shift = 1 / pipeline.scheduler.config.shift
    objective = FlowMatchingObjective(pipeline.transformer, pipeline.vae, shift, args.label_dropout)
    validate = GeneratorValidation(
        pipeline,
        objective,
        list(data.validation_batches(loop_args.train_batch_size)),
        names,
        args.grid_images,
        args.validation_inference_steps,
        loop_args.seed,
    )

    def save():
        pipeline.vae.image_encoder = None
        pipeline.save_pretrained(loop_args.output_dir)

    loop.run(objective, data, validate, save)


if __name__ == "__main__":
    main()
