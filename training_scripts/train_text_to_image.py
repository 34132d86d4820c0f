"""Text to image (arXiv 2512.07829, section 5.2): flow matching of a denoiser on latents, given captions.

    accelerate launch training_scripts/train_text_to_image.py \\
        --config training_scripts/configs/text_to_image/mmdit_cc12m.yaml

The data are pictures with captions (--caption_column), or latents that cache_latents.py made of them: --dataset_name
names either. A cache that was made with a text encoder has the captions' embeddings: the training itself then goes
without one. With --pipeline a published model is trained on.

`output_dir` becomes an `FAETextToImagePipeline` with the text encoder; its tokenizer comes without the frozen encoder,
which drawing does not need.
"""

from dataclasses import dataclass, field
from typing import Literal

from diffusers import FlowMatchEulerDiscreteScheduler

from hf_fae import (
    FAETextToImagePipeline,
    FlowMatchEulerMaruyamaScheduler,
    MMDiTTransformer2DModel,
    RAEv2Transformer2DModel,
)
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.latent_cache import CachedLatents
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.generation import (
    CaptionArguments,
    latent_size,
    objective_of,
    open_caption_encoder,
    open_tokenizer,
    train_generator,
)
from hf_fae.utils.parsing import parse_arguments


@dataclass
class TextToImageArguments(CaptionArguments):
    """The tokenizer, the text encoder, the denoiser, its loss, and how the pipeline draws."""

    denoiser: Literal["mmdit", "raev2"] = field(
        default="mmdit", metadata={"help": "MMDiT, or RAEv2's, whose head is by default its own, 2 x 2048."}
    )
    patch_size: int = field(default=1, metadata={"help": "Latents per token, along each axis."})
    num_layers: int = field(default=16, metadata={"help": "Layers of the denoiser."})
    num_attention_heads: int = field(default=16, metadata={"help": "Heads of the denoiser."})
    attention_head_dim: int = field(default=64, metadata={"help": "Width of a head."})
    qk_norm: bool = field(default=False, metadata={"help": "MMDiT: RMSNorm on queries and keys."})
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
        default=0.9, metadata={"help": "Noise time from which on the pipeline has this scale; before it, none."}
    )
    validation_inference_steps: int = field(default=50, metadata={"help": "Steps for the pictures of a validation."})


def new_pipeline(args: TextToImageArguments, data: ImageData | CachedLatents) -> FAETextToImagePipeline:
    """A pipeline with a fresh denoiser for the captions of the data."""
    vae = open_tokenizer(args.vae, args.image_encoder, data)
    captions = open_caption_encoder(args.text_encoder, args.max_caption_length, data)
    common = {
        "sample_size": latent_size(vae, data),
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
        transformer = RAEv2Transformer2DModel(num_classes=None, **common)
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
    args, *others = parse_arguments(TextToImageArguments, DataArguments, LoopArguments, argv=argv, description=__doc__)
    train_generator(
        args,
        *others,
        FAETextToImagePipeline,
        lambda data: new_pipeline(args, data),
        lambda pipe, condition: objective_of(pipe, condition, args.label_dropout, args.base_weight),
        text_encoder=args.text_encoder,
        num_inference_steps=args.validation_inference_steps,
    )


if __name__ == "__main__":
    main()
