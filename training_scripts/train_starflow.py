"""A class-conditional normalizing flow on latents (STARFlow, arXiv 2506.06276): maximum likelihood on noisy latents.

    accelerate launch training_scripts/train_starflow.py --config training_scripts/configs/starflow_imagenet.yaml

The data are pictures, or latents that cache_latents.py made of them: --dataset_name names either. With --pipeline a
published flow is trained on; classes that it does not know are added. Validation logs the bits per dimension of
held-out latents.

`output_dir` becomes an `FAEStarFlowPipeline` with the class names; its tokenizer comes without the frozen encoder,
which drawing does not need.
"""

from dataclasses import dataclass, field

from hf_fae import FAEStarFlowPipeline, STARFlowTransformer2DModel
from hf_fae.training.arguments import LoopArguments, parse_arguments
from hf_fae.training.data import DataArguments, ImageData
from hf_fae.training.generation import (
    GeneratorValidation,
    describe_classes,
    latent_size,
    match_classes,
    open_data,
    open_pipeline,
    open_tokenizer,
    save_without_encoder,
)
from hf_fae.training.latent_cache import CachedLatents
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.objectives import STARFlowObjective


@dataclass
class STARFlowArguments:
    """The tokenizer, the flow, its loss, and how the pipeline draws."""

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
        metadata={"help": "FAEStarFlowPipeline to train on (Hub id or folder), instead of a new one as below."},
    )
    patch_size: int = field(default=1, metadata={"help": "Latents per token, along each axis."})
    num_layers: list[int] = field(
        default_factory=lambda: [2, 2, 2, 2, 2, 18],
        metadata={"help": "Layers of each block: shallow ones, which data pass first, then the deep one."},
    )
    num_attention_heads: int = field(default=32, metadata={"help": "Heads of the flow."})
    attention_head_dim: int = field(default=64, metadata={"help": "Width of a head."})
    noise_sigma: float = field(default=0.3, metadata={"help": "Noise on the normalised latents."})
    latent_norm_weight: float = field(default=1e-4, metadata={"help": "Weight of the mean square of block inputs."})
    label_dropout: float = field(default=0.1, metadata={"help": "Share of labels replaced by the null class."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Default guidance scale 1 + w of the pipeline."})
    denoise: bool = field(
        default=True, metadata={"help": "Take the noise off by a score step; false: the tokenizer's decoders do it."}
    )
    grid_images: int = field(default=16, metadata={"help": "Pictures of a validation, spread over the classes."})


def new_pipeline(args: STARFlowArguments, data: ImageData | CachedLatents) -> FAEStarFlowPipeline:
    """A pipeline with a fresh flow for the classes of the data."""
    vae = open_tokenizer(args.vae, args.image_encoder, data)
    transformer = STARFlowTransformer2DModel(
        sample_size=latent_size(vae, data),
        patch_size=args.patch_size,
        in_channels=vae.config.latent_channels,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        num_classes=len(data.id2label),
        noise_sigma=args.noise_sigma,
    )
    pipeline = FAEStarFlowPipeline(
        vae, transformer, id2label=data.id2label, guidance_scale=args.guidance_scale, denoise=args.denoise
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main(argv: list[str] | None = None) -> None:
    args, data_args, loop_args, config = parse_arguments(
        STARFlowArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = open_data(data_args, loop_args.seed)
        if args.pipeline:
            pipeline = open_pipeline(args.pipeline, FAEStarFlowPipeline, args.vae, args.image_encoder, data)
        else:
            pipeline = new_pipeline(args, data)
    loop.print(data.describe())
    data, names, new_classes = match_classes(pipeline, data)
    loop.print(describe_classes(names, new_classes))
    pipeline.to(loop.device)
    objective = STARFlowObjective(pipeline.transformer, pipeline.vae, args.latent_norm_weight, args.label_dropout)
    validate = GeneratorValidation(
        pipeline,
        objective,
        list(data.validation_batches(loop_args.train_batch_size)),
        names,
        args.grid_images,
        loop_args.seed,
    )
    loop.run(objective, data, validate, save=lambda: save_without_encoder(pipeline, loop_args.output_dir))


if __name__ == "__main__":
    main()
