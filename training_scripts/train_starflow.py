"""A normalizing flow on latents, of classes or of captions (STARFlow, arXiv 2506.06276): maximum likelihood.

    accelerate launch training_scripts/train_starflow.py \\
        --config training_scripts/configs/starflow/starflow_imagenet.yaml

The data are pictures, or latents that cache_latents.py made of them: --dataset_name names either. With --text_encoder
a new flow reads their captions, else it learns their classes. With --pipeline a published flow is trained on; classes
that it does not know are added. Validation logs the bits per dimension of held-out latents.

`output_dir` becomes an `FAEStarFlowPipeline` with the class names or the text encoder; its tokenizer comes without the
frozen encoder, which drawing does not need.
"""

from dataclasses import dataclass, field

from hf_fae import FAEStarFlowPipeline, STARFlowTransformer2DModel
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.latent_cache import CachedLatents
from hf_fae.objectives.starflow import STARFlowObjective
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.generation import (
    CaptionArguments,
    class_names,
    latent_size,
    open_caption_encoder,
    open_tokenizer,
    train_generator,
)
from hf_fae.utils.parsing import parse_arguments


@dataclass
class STARFlowArguments(CaptionArguments):
    """The tokenizer, the flow, its loss, and how the pipeline draws."""

    text_encoder: str | None = field(
        default=None, metadata={"help": "Text encoder of a flow of captions (Hub id or folder); none: of classes."}
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
    guidance_scale: float = field(default=1.0, metadata={"help": "Default guidance scale 1 + w of the pipeline."})
    denoise: bool = field(
        default=True, metadata={"help": "Take the noise off by a score step; false: the tokenizer's decoders do it."}
    )


def new_pipeline(args: STARFlowArguments, data: ImageData | CachedLatents) -> FAEStarFlowPipeline:
    """A pipeline with a fresh flow for the captions of the data or, without a text encoder, for their classes."""
    vae = open_tokenizer(args.vae, args.image_encoder, data)
    if args.text_encoder is None:
        condition = {"num_classes": len(class_names(data))}
        components = {"text_encoder": None, "tokenizer": None, "id2label": data.id2label}
    else:
        captions = open_caption_encoder(args.text_encoder, args.max_caption_length, data)
        condition = {
            "num_classes": None,
            "caption_channels": captions.width,
            "max_caption_length": captions.max_length,
        }
        components = {"text_encoder": captions.text_encoder, "tokenizer": captions.tokenizer}
        components["text_encoder_id"] = captions.hub_id
    transformer = STARFlowTransformer2DModel(
        sample_size=latent_size(vae, data),
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
    args, *others = parse_arguments(STARFlowArguments, DataArguments, LoopArguments, argv=argv, description=__doc__)
    train_generator(
        args,
        *others,
        FAEStarFlowPipeline,
        lambda data: new_pipeline(args, data),
        lambda pipe, condition: STARFlowObjective(
            pipe.transformer, pipe.vae, args.latent_norm_weight, args.label_dropout, condition
        ),
        text_encoder=args.text_encoder,
    )


if __name__ == "__main__":
    main()
