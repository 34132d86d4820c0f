"""A class- or text-conditional normalizing flow on latents (STARFlow, arXiv 2506.06276): maximum likelihood.

    accelerate launch training_scripts/train_starflow.py \\
        --config training_scripts/configs/starflow/starflow_imagenet.yaml

--dataset_name names images or their latents, cached by cache_latents.py. With --text_encoder a new flow is conditioned
on captions, else on classes. --pipeline continues from a published flow and adds the classes that it does not know.
Validation logs the bits per dimension of held-out latents.

`output_dir` becomes an `FAEStarFlowPipeline` with the class names or the text encoder; its tokenizer is saved without
the frozen encoder, which generation does not need.
"""

from dataclasses import dataclass, field
from functools import partial

from hf_fae import FAEStarFlowPipeline, STARFlowTransformer2DModel
from hf_fae.data.conditions import prepare_condition
from hf_fae.data.images import DataArguments
from hf_fae.data.opening import (
    check_pipeline_arguments,
    latent_sample_size,
    open_caption_encoder,
    open_pipeline,
    open_training_data,
)
from hf_fae.data.protocol import GeneratorData
from hf_fae.objectives.generator import CaptionArguments
from hf_fae.objectives.starflow import STARFlowObjective
from hf_fae.objectives.validation import GeneratorValidation
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.publish import save_without_encoder
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class STARFlowArguments(CaptionArguments):
    """The tokenizer, the flow, its loss, and the defaults of the pipeline."""

    text_encoder: str | None = field(
        default=None,
        metadata={"help": "Text encoder (Hub id or folder) of a flow on captions; none: on classes."},
    )
    patch_size: int = field(default=1, metadata={"help": "Latents per token, along each axis."})
    num_layers: list[int] = field(
        default_factory=lambda: [2, 2, 2, 2, 2, 18],
        metadata={"help": "Layers of each block: the shallow ones, first for data, then the deep one."},
    )
    num_attention_heads: int = field(default=32, metadata={"help": "Heads of the flow."})
    attention_head_dim: int = field(default=64, metadata={"help": "Width of a head."})
    noise_sigma: float = field(default=0.3, metadata={"help": "Noise on the normalised latents."})
    latent_norm_weight: float = field(default=1e-4, metadata={"help": "Weight of the mean square of block inputs."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Default guidance scale 1 + w of the pipeline."})
    denoise: bool = field(
        default=True, metadata={"help": "Remove the noise by a score step; false: the tokenizer's decoders do."}
    )


def new_pipeline(args: STARFlowArguments, data: GeneratorData) -> FAEStarFlowPipeline:
    """A pipeline with an untrained flow for the captions of the data or, without a text encoder, for their classes."""
    vae = data.load_tokenizer(args.vae, args.image_encoder)
    if args.text_encoder is None:
        condition = {"num_classes": len(data.class_names())}
        components = {"text_encoder": None, "tokenizer": None, "id2label": data.id2label}
    else:
        captions = open_caption_encoder(data, args.text_encoder, args.max_caption_length)
        condition = {
            "num_classes": None,
            "caption_channels": captions.width,
            "max_caption_length": captions.max_length,
        }
        components = {"text_encoder": captions.text_encoder, "tokenizer": captions.tokenizer}
        components["text_encoder_id"] = captions.hub_id
    transformer = STARFlowTransformer2DModel(
        sample_size=latent_sample_size(data, vae),
        patch_size=args.patch_size,
        in_channels=vae.config.latent_channels,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        noise_sigma=args.noise_sigma,
        **condition,
    )
    return FAEStarFlowPipeline(
        vae, transformer, guidance_scale=args.guidance_scale, denoise=args.denoise, **components
    )


def main(argv: list[str] | None = None) -> None:
    args, data_args, loop_args, config = parse_arguments(
        STARFlowArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = open_training_data(data_args, loop_args.seed)
        if args.pipeline is None:
            pipeline = new_pipeline(args, data)
        else:
            components = {"vae": args.vae, "image_encoder": args.image_encoder, "text_encoder": args.text_encoder}
            pipeline = open_pipeline(data, args.pipeline, FAEStarFlowPipeline, **components)
            check_pipeline_arguments(args, pipeline)
    loop.print(data.describe())
    data, condition = prepare_condition(pipeline, data)
    loop.print(condition.describe())
    objective = STARFlowObjective(
        pipeline.transformer, pipeline.vae, args.latent_norm_weight, args.label_dropout, condition
    ).to(loop.device)
    validation = GeneratorValidation(
        pipeline,
        objective,
        data.validation_batches(loop_args.train_batch_size),
        grid_images=args.grid_images,
        seed=loop_args.seed,
    )
    loop.run(objective, data, validation, save=partial(save_without_encoder, pipeline, loop_args.output_dir))


if __name__ == "__main__":
    run(main)
