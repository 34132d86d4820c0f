"""Text to image (arXiv 2512.07829, section 5.2): flow matching of a denoiser on latents, conditioned on captions.

    accelerate launch training_scripts/train_text_to_image.py \\
        --config training_scripts/configs/text_to_image/mmdit_cc12m.yaml

--dataset_name names images with captions (--caption_column) or their latents, cached by cache_latents.py. A cache made
with a text encoder holds the captions' embeddings: the training itself then needs none. --pipeline continues from a
published model.

`output_dir` becomes an `FAETextToImagePipeline` with the text encoder; its tokenizer is saved without the frozen
encoder, which generation does not need.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from diffusers import FlowMatchEulerDiscreteScheduler

from hf_fae import (
    FAETextToImagePipeline,
    FlowMatchEulerMaruyamaScheduler,
    MMDiTTransformer2DModel,
    RAEv2Transformer2DModel,
)
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
from hf_fae.objectives.from_pipeline import objective_of
from hf_fae.objectives.generator import CaptionArguments
from hf_fae.objectives.repa import REPAArguments, add_repa
from hf_fae.objectives.validation import GeneratorValidation
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.publish import save_without_encoder
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class TextToImageArguments(CaptionArguments):
    """The tokenizer, the text encoder, the denoiser, its loss, and the defaults of the pipeline."""

    denoiser: Literal["mmdit", "raev2"] = field(
        default="mmdit", metadata={"help": "MMDiT, or RAEv2's, which has a wide head."}
    )
    patch_size: int = field(default=1, metadata={"help": "Latents per token, along each axis."})
    num_layers: int = field(default=16, metadata={"help": "Layers of the denoiser."})
    num_attention_heads: int = field(default=16, metadata={"help": "Heads of the denoiser."})
    attention_head_dim: int = field(default=64, metadata={"help": "Width of a head."})
    head_num_layers: int = field(default=2, metadata={"help": "RAEv2: layers of the head."})
    head_num_attention_heads: int = field(default=16, metadata={"help": "RAEv2: heads of the head."})
    head_attention_head_dim: int = field(default=128, metadata={"help": "RAEv2: width of such a head."})
    qk_norm: bool = field(default=False, metadata={"help": "RMSNorm on queries and keys; RAEv2 has it."})
    prediction_type: Literal["velocity", "sample"] = field(
        default="velocity", metadata={"help": "sample: the clean latents (RAEv2)."}
    )
    base_head_layer: int | None = field(
        default=None, metadata={"help": "Blocks before a base head, for internal guidance; none: no head."}
    )
    base_weight: float = field(default=1.0, metadata={"help": "Weight of the loss of the base head."})
    shift: float = field(default=0.4, metadata={"help": "Time shift s in training and sampling."})
    sampler: Literal["ode", "sde"] = field(default="ode", metadata={"help": "Euler, or Euler-Maruyama."})
    num_inference_steps: int = field(default=250, metadata={"help": "Default steps of the pipeline."})
    guidance_scale: float = field(default=1.5, metadata={"help": "Default guidance scale of the pipeline."})
    guidance_t_high: float = field(
        default=0.9, metadata={"help": "Noise time below which the pipeline uses this scale; above it, none."}
    )
    validation_inference_steps: int = field(default=50, metadata={"help": "Steps of validation samples."})


def new_pipeline(args: TextToImageArguments, data: GeneratorData) -> FAETextToImagePipeline:
    """A pipeline with an untrained denoiser for the captions of the data."""
    vae = data.load_tokenizer(args.vae, args.image_encoder)
    captions = open_caption_encoder(data, args.text_encoder, args.max_caption_length)
    common = {
        "sample_size": latent_sample_size(data, vae),
        "patch_size": args.patch_size,
        "in_channels": vae.config.latent_channels,
        "num_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "attention_head_dim": args.attention_head_dim,
        "caption_channels": captions.width,
        "max_caption_length": captions.max_length,
        "prediction_type": args.prediction_type,
        "base_head_layer": args.base_head_layer,
    }
    if args.denoiser == "raev2":
        transformer = RAEv2Transformer2DModel(
            num_classes=None,
            head_num_layers=args.head_num_layers,
            head_num_attention_heads=args.head_num_attention_heads,
            head_attention_head_dim=args.head_attention_head_dim,
            **common,
        )
    else:
        transformer = MMDiTTransformer2DModel(qk_norm=args.qk_norm, **common)
    samplers = {"ode": FlowMatchEulerDiscreteScheduler, "sde": FlowMatchEulerMaruyamaScheduler}
    return FAETextToImagePipeline(
        vae,
        transformer,
        samplers[args.sampler](shift=1 / args.shift),
        captions.text_encoder,
        captions.tokenizer,
        guidance_scale=[(0.0, args.guidance_t_high, args.guidance_scale)],
        num_inference_steps=args.num_inference_steps,
        text_encoder_id=captions.hub_id,
    )


def main(argv: list[str] | None = None) -> None:
    args, repa_args, data_args, loop_args, config = parse_arguments(
        TextToImageArguments, REPAArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        opened = open_training_data(data_args, loop_args.seed)
        if args.pipeline is None:
            pipeline = new_pipeline(args, opened)
        else:
            components = {"vae": args.vae, "image_encoder": args.image_encoder, "text_encoder": args.text_encoder}
            pipeline = open_pipeline(opened, args.pipeline, FAETextToImagePipeline, **components)
            check_pipeline_arguments(args, pipeline)
    loop.print(opened.describe())
    data, condition = prepare_condition(pipeline, opened)
    loop.print(condition.describe())
    objective = objective_of(pipeline, condition, args.label_dropout, args.base_weight)
    data = add_repa(objective, repa_args, data, opened)
    objective = objective.to(loop.device)
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
