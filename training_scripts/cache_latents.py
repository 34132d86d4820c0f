"""Encode a data set once for training generators: posterior moments of its images and of their mirrored copies.

With --text_encoder the captions are embedded once, too: text-to-image training then runs without a text encoder.

    accelerate launch training_scripts/cache_latents.py \\
        --config training_scripts/configs/latents/latents_dinov2_base.yaml

Run it again after an interruption: finished shards are kept. `output_dir/tokenizer` is the tokenizer with the
statistics of these latents; --update_vae also writes them into the tokenizer's own folder.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffusers import AutoencoderKL

from hf_fae.data.captions import CAPTION_LENGTH, load_caption_encoder
from hf_fae.data.encode_dataset import encode_dataset
from hf_fae.data.feature_cache import FeatureData
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.statistics import store_latent_statistics
from hf_fae.loading import load_tokenizer
from hf_fae.training.processes import make_accelerator
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class CacheArguments:
    """What encodes the data, and where the latents are written."""

    vae: str = field(metadata={"help": "Tokenizer, AutoencoderFAE or AutoencoderKL: Hub id or local folder."})
    output_dir: str = field(metadata={"help": "Folder of the cache."})
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), for a tokenizer saved without it."}
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Features of these images, cached by this script with an identity FAE: much faster."},
    )
    text_encoder: str | None = field(
        default=None, metadata={"help": "Text encoder (Hub id or folder) that embeds caption_column once."}
    )
    max_caption_length: int = field(
        default=CAPTION_LENGTH, metadata={"help": "With text_encoder: tokens that captions are truncated to."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images per forward pass and process."})
    rows_per_shard: int = field(default=4096, metadata={"help": "Rows of the data set in one parquet file."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode images, per rank."})
    mixed_precision: Literal["no", "bf16", "fp16"] = field(default="no", metadata={"help": "Autocast precision."})
    seed: int = field(default=0, metadata={"help": "Chooses the validation rows, as in training."})
    max_corrupt_share: float = field(
        default=0.1, metadata={"help": "Corrupt rows are left out; stop if their share exceeds this one."}
    )
    update_vae: bool = field(
        default=False, metadata={"help": "Also write the latent statistics into the folder given as --vae."}
    )


def main(argv: list[str] | None = None) -> None:
    args, data_args, _ = parse_arguments(CacheArguments, DataArguments, argv=argv, description=__doc__)
    if args.update_vae and not Path(args.vae).is_dir():
        raise ValueError(f"vae must be a local folder for update_vae, got {args.vae!r}")
    accelerator = make_accelerator(args.mixed_precision)
    with accelerator.main_process_first():
        data = ImageData(data_args, args.seed)
        vae = load_tokenizer(args.vae)
        data.prepare_tokenizer(vae, args.image_encoder)
        captions = None
        if args.text_encoder is not None:
            captions = load_caption_encoder(args.text_encoder, args.max_caption_length).to(accelerator.device)
        features = FeatureData(data, args.feature_cache, vae) if args.feature_cache is not None else None
    if args.update_vae and isinstance(vae, AutoencoderKL):
        raise ValueError(f"update_vae must be False for an AutoencoderKL, whose scale is fixed, got {args.vae!r}")
    accelerator.print(data.describe())
    index = encode_dataset(
        args.output_dir,
        vae.to(accelerator.device),
        data,
        accelerator,
        source=args.vae,
        batch_size=args.batch_size,
        rows_per_shard=args.rows_per_shard,
        num_workers=args.num_workers,
        max_corrupt_share=args.max_corrupt_share,
        features=features,
        captions=captions,
    )
    if accelerator.is_main_process and args.update_vae:
        store_latent_statistics(args.vae, vae.latents_mean, vae.latents_std)
    for split, content in index["splits"].items():
        accelerator.print(f"{split}: {content['rows']:,} rows in {len(content['shards'])} shards", end="")
        accelerator.print(f"; left out: {json.dumps(content['damaged'])}" if content["damaged"] else "")
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
