"""The two stages of tokenizers that encode pixels themselves, l-DeTok and MAETok: arguments and their checks.

In the first stage everything is trained while patches are masked; in the second the decoder alone, on the latents of
the frozen encoder.
"""

from dataclasses import dataclass, field
from typing import Literal

from ..autoencoders.pixel_tokenizer import PixelTokenizer
from ..data.source import DataArguments


__all__ = ["PixelTokenizerArguments", "check_stage", "check_stage_arguments", "pixel_tokenizer_sizes"]


@dataclass
class PixelTokenizerArguments:
    """The stage, and the shape of a new tokenizer in the first one; by default ViT-B in both halves."""

    stage: Literal[1, 2] = field(default=1, metadata={"help": "1: train a new tokenizer; 2: train the decoder alone."})
    tokenizer: str | None = field(default=None, metadata={"help": "Stage 2: result of stage 1, Hub id or folder."})
    patch_size: int = field(default=16, metadata={"help": "Stage 1: image pixels per patch, along each axis."})
    encoder_hidden_size: int = field(default=768, metadata={"help": "Stage 1: width of the encoder."})
    encoder_num_layers: int = field(default=12, metadata={"help": "Stage 1: layers of the encoder."})
    encoder_num_attention_heads: int = field(default=12, metadata={"help": "Stage 1: heads of the encoder."})
    decoder_hidden_size: int = field(default=768, metadata={"help": "Stage 1: width of the decoder."})
    decoder_num_layers: int = field(default=12, metadata={"help": "Stage 1: layers of the decoder."})
    decoder_num_attention_heads: int = field(default=12, metadata={"help": "Stage 1: heads of the decoder."})
    latent_statistics_images: int | None = field(
        default=None,
        metadata={"help": "Stage 1: images for the latents' mean and std, at the end; none: the training set."},
    )


def pixel_tokenizer_sizes(args: PixelTokenizerArguments, resolution: int) -> dict[str, int]:
    """The constructor arguments that both tokenizers have."""
    halves = [f"{half}_{size}" for half in ("encoder", "decoder") for size in ("hidden_size", "num_layers")]
    halves += ["encoder_num_attention_heads", "decoder_num_attention_heads"]
    return {"sample_size": resolution, **{name: getattr(args, name) for name in ("patch_size", *halves)}}


def check_stage(stage: int) -> None:
    """Refuse other stages than 1 and 2.

    Raises:
        ValueError: another one.
    """
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 or 2, got {stage!r}")


def check_stage_arguments(
    args: PixelTokenizerArguments, data_args: DataArguments, tokenizer_class: type[PixelTokenizer]
) -> None:
    """Refuse arguments that do not fit each other, before anything is written.

    Raises:
        ValueError: `tokenizer` is given in stage 1; it is missing, of another class or for other images in stage 2; or
            `latent_statistics_images` is no number of images.
    """
    count = args.latent_statistics_images
    if count is not None and count < 1:
        raise ValueError(f"latent_statistics_images must be positive, got {count}")
    if args.stage == 1:
        if args.tokenizer is not None:
            raise ValueError(f"tokenizer must be None in stage 1, which makes a new one, got {args.tokenizer!r}")
        if count is None and data_args.streaming:
            raise ValueError("latent_statistics_images must be a number for streamed data, got None")
        return
    if args.tokenizer is None:
        raise ValueError("tokenizer must name the result of stage 1, got None")
    saved = tokenizer_class.load_config(args.tokenizer)
    name, size = saved.get("_class_name"), saved.get("sample_size")
    if name != tokenizer_class.__name__:
        raise ValueError(f"tokenizer must be an {tokenizer_class.__name__}, got {name} in {args.tokenizer!r}")
    if size != data_args.resolution:
        raise ValueError(f"resolution must be that of the tokenizer, {size}, got {data_args.resolution}")
