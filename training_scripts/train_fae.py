"""Stage Ia of FAE (arXiv 2512.07829, section 4.1): the single attention layer and the feature decoder, on features.

    accelerate launch training_scripts/train_fae.py --config training_scripts/configs/fae/fae_dinov2_base.yaml

`output_dir` becomes an `AutoencoderFAE` with its frozen encoder; its pixel decoder is still untrained (see
train_pixel_decoder.py).

With --fae and --latent_noise the feature decoder of a trained FAE is tuned to remove the noise that a STARFlow leaves
on its samples (arXiv 2506.06276, section 3.3); encoder, latents and pixel decoder stay unchanged.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from hf_fae import AutoencoderFAE, VisionEncoder
from hf_fae.autoencoders.initialization import load_trained_fae
from hf_fae.data.feature_cache import FeatureData
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.statistics import measure_feature_statistics, measure_sample_statistics
from hf_fae.objectives.fae import FeatureObjective, NoisyLatentObjective
from hf_fae.objectives.validation import FeatureValidation
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class FAEArguments:
    """The tokenizer and its loss."""

    image_encoder: str | None = field(
        default=None,
        metadata={"help": "Frozen encoder (Hub id or folder); with fae, if that was saved without it."},
    )
    fae: str | None = field(
        default=None, metadata={"help": "Trained AutoencoderFAE (Hub id or folder), whose feature decoder is tuned."}
    )
    latent_noise: float = field(
        default=0.0, metadata={"help": "With fae: noise on normalised latents, the noise_sigma of the flow."}
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Features of the training images, cached by cache_latents.py with an identity FAE."},
    )
    latent_channels: int = field(default=32, metadata={"help": "Channels of the latents."})
    patch_size: int = field(default=16, metadata={"help": "Image pixels per latent, along each axis."})
    encoder_type: Literal["attention", "linear", "identity"] = field(
        default="attention",
        metadata={
            "help": "The paper's single attention layer, its linear ablation, or identity: the latents are the "
            "features (latent_channels is their width), and only the pixel decoder can be trained."
        },
    )
    encoder_attention_head_dim: int = field(default=256, metadata={"help": "Head width of the attention layer."})
    decoder_num_layers: int = field(default=6, metadata={"help": "Layers of the feature decoder."})
    decoder_attention_head_dim: int = field(default=64, metadata={"help": "Head width of the feature decoder."})
    pixel_hidden_size: int = field(default=1024, metadata={"help": "Width of the pixel decoder, trained later."})
    pixel_num_layers: int = field(default=24, metadata={"help": "Layers of the pixel decoder."})
    pixel_num_attention_heads: int = field(default=16, metadata={"help": "Heads of the pixel decoder."})
    pixel_head: Literal["linear", "overlap"] = field(
        default="linear", metadata={"help": "A patch per token, or blended windows without seams between patches."}
    )
    kl_weight: float = field(default=1e-3, metadata={"help": "Weight of the KL term, both terms being means."})
    feature_statistics_images: int = field(
        default=2048, metadata={"help": "Images for the features' mean and std; 0: do not standardise features."}
    )
    latent_statistics_images: int = field(
        default=10_000, metadata={"help": "Images for the latents' mean and std, at the end."}
    )


def check_arguments(args: FAEArguments) -> None:
    if args.fae is None and args.image_encoder is None:
        raise ValueError("image_encoder must name the frozen encoder of a new FAE, got None")
    if (args.fae is None) != (args.latent_noise == 0):
        raise ValueError(
            f"latent_noise must be positive with fae, and 0 without, got {args.latent_noise} and fae {args.fae!r}"
        )


def new_fae(args: FAEArguments, resolution: int) -> AutoencoderFAE:
    """An untrained FAE of the shape of the arguments, with its frozen encoder."""
    return AutoencoderFAE.from_encoder(
        VisionEncoder.from_pretrained(args.image_encoder, dtype=torch.float32),
        latent_channels=args.latent_channels,
        sample_size=resolution,
        patch_size=args.patch_size,
        encoder_type=args.encoder_type,
        encoder_attention_head_dim=args.encoder_attention_head_dim,
        decoder_num_layers=args.decoder_num_layers,
        decoder_attention_head_dim=args.decoder_attention_head_dim,
        pixel_hidden_size=args.pixel_hidden_size,
        pixel_num_layers=args.pixel_num_layers,
        pixel_num_attention_heads=args.pixel_num_attention_heads,
        pixel_head=args.pixel_head,
    )


def main(argv: list[str] | None = None) -> None:
    args, data_args, loop_args, config = parse_arguments(
        FAEArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    check_arguments(args)
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = ImageData(data_args, loop_args.seed)
        if args.fae is None:
            model = new_fae(args, data_args.resolution)
        else:
            model = load_trained_fae(args.fae, args.image_encoder, data_args.resolution)
    model.to(loop.device)
    loop.print(data.describe())
    batch_size, num_workers = loop_args.train_batch_size, loop_args.dataloader_num_workers
    validation_batches = data.validation_batches(batch_size)

    if args.feature_cache is not None:
        data = FeatureData(data, args.feature_cache, model)
        if args.fae is None:
            model.set_feature_statistics(data.mean, data.std)
    elif args.fae is None and args.feature_statistics_images and loop.resume_from is None:
        with loop.accelerator.autocast():
            measure_feature_statistics(model, data, args.feature_statistics_images, batch_size, num_workers)
        loop.print(f"raw features: rms of the channel stds {model.features_std.square().mean().sqrt():.3f}")

    if args.encoder_type == "identity" and args.fae is None:  # nothing to train
        if not loop_args.dry_run:
            if loop.is_main:
                model.eval().save_pretrained(loop_args.output_dir)
            loop.print(f"saved to {loop_args.output_dir}: the features are its latents")
        loop.accelerator.end_training()
        return
    if args.fae is None:
        objective = FeatureObjective(model, args.kl_weight)
    else:
        objective = NoisyLatentObjective(model, args.latent_noise)
    validation = FeatureValidation(model, validation_batches, latent_noise=args.latent_noise, seed=loop_args.seed)

    def save():
        model.eval()
        if args.fae is None:  # otherwise the latents have not changed
            with loop.accelerator.autocast():
                measure_sample_statistics(model, data, args.latent_statistics_images, batch_size, num_workers)
        model.save_pretrained(loop_args.output_dir)

    loop.run(objective, data, validation, save)


if __name__ == "__main__":
    run(main)
