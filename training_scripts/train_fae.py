"""Stage Ia of FAE (arXiv 2512.07829, section 4.1): the single attention layer and the feature decoder, on features.

    accelerate launch training_scripts/train_fae.py --config training_scripts/configs/fae/fae_dinov2_base.yaml

`output_dir` becomes an `AutoencoderFAE` with its frozen encoder; its pixel decoder is still untrained (see
train_pixel_decoder.py).

With --fae and --latent_noise the feature decoder of a trained FAE is tuned to take off the noise that a STARFlow
leaves on its samples (arXiv 2506.06276, section 3.3); encoder, latents and pixel decoder stay as they are.
"""

import itertools
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn import functional as F

from hf_fae import AutoencoderFAE, VisionEncoder
from hf_fae.autoencoders.frozen_encoder import frozen_features
from hf_fae.data.feature_cache import FeatureData
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.statistics import channel_statistics
from hf_fae.objectives.base import add_noise
from hf_fae.objectives.fae import FeatureObjective, NoisyLatentObjective
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.tokenizer import load_trained_fae
from hf_fae.utils.image_metrics import feature_cosine
from hf_fae.utils.parsing import parse_arguments
from hf_fae.utils.randomness import ImageRandom


SEEN = {"pixel_values", "features"}  # what the features of a batch come from


@dataclass
class FAEArguments:
    """The tokenizer and its loss."""

    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen vision encoder (Hub id or folder); with fae, where that lacks it."}
    )
    fae: str | None = field(
        default=None, metadata={"help": "Trained AutoencoderFAE (Hub id or folder), whose feature decoder is tuned."}
    )
    latent_noise: float = field(
        default=0.0, metadata={"help": "With fae: noise on normalised latents, the noise_sigma of the flow."}
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Features of the training pictures, which cache_latents.py made with an identity FAE."},
    )
    latent_channels: int = field(default=32, metadata={"help": "Channels of the latents."})
    patch_size: int = field(default=16, metadata={"help": "Image pixels per latent, along each axis."})
    encoder_type: Literal["attention", "linear", "identity"] = field(
        default="attention",
        metadata={
            "help": "The paper's single attention layer, its linear ablation, or identity: features are the latents "
            "(latent_channels is their width), so that there is nothing to train but the pixel decoder."
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
        default=2048, metadata={"help": "Images for the features' mean and std; 0: leave the features as they are."}
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
    """A fresh FAE of the shape of the arguments, with its frozen encoder."""
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
            objective = None if args.encoder_type == "identity" else FeatureObjective(model, args.kl_weight)
        else:
            model = load_trained_fae(args.fae, args.image_encoder, data_args.resolution)
            objective = NoisyLatentObjective(model, args.latent_noise)
    model.to(loop.device)
    loop.print(data.describe())
    batch_size = loop_args.train_batch_size
    validation_batches = list(data.validation_batches(batch_size))

    def training_features(count):
        """Features and grids of about `count` training images in whole batches, at most an epoch of them."""
        count = count if data_args.streaming else min(count, len(data))
        batches = data.batches(batch_size, num_workers=loop_args.dataloader_num_workers)
        for batch in itertools.islice(batches, -(-count // batch_size)):
            yield frozen_features(model, {name: batch[name].to(loop.device) for name in SEEN & batch.keys()})

    if args.feature_cache is not None:
        data = FeatureData(data, args.feature_cache, model)
        if args.fae is None:
            model.set_feature_statistics(data.mean, data.std)
    elif args.fae is None and args.feature_statistics_images and loop.resume_from is None:
        with loop.accelerator.autocast():
            statistics = channel_statistics(
                features for features, _ in training_features(args.feature_statistics_images)
            )
        model.set_feature_statistics(*statistics)
        loop.print(f"raw features: rms of the channel stds {model.features_std.square().mean().sqrt():.3f}")

    def validate(step):
        """Of the features that come back from the mode of the posterior, with noise if that is what is trained on."""
        cosines, errors, sizes = [], [], []
        for batch in validation_batches:
            features, grid = model.extract_features(batch["pixel_values"].to(loop.device))
            latents = model.encode_features(features, grid).latent_dist.mode()
            latents = add_noise(latents, args.latent_noise, ImageRandom(loop_args.seed, sum(sizes), loop.device))
            reconstruction = model.decode_features(latents)
            cosines.append(feature_cosine(reconstruction, features))
            errors.append(F.mse_loss(*map(model.standardize_features, (reconstruction, features))))
            sizes.append(len(features))
        weights = torch.tensor(sizes, device=loop.device) / sum(sizes)
        return {
            "feature_cosine": (torch.stack(cosines) * weights).sum().item(),
            "feature_mse": (torch.stack(errors) * weights).sum().item(),
        }

    @torch.no_grad()
    def save():
        model.eval()
        if args.fae is None and args.encoder_type != "identity":
            with loop.accelerator.autocast():
                posteriors = (
                    model.encode_features(*batch).latent_dist
                    for batch in training_features(args.latent_statistics_images)
                )
                mean, std = channel_statistics(posterior.sample().movedim(1, -1) for posterior in posteriors)
            model.set_latent_statistics(mean.view_as(model.latents_mean), std.view_as(model.latents_std))
        model.save_pretrained(loop_args.output_dir)

    if args.encoder_type == "identity":
        if not loop_args.dry_run:
            if loop.is_main:
                save()
            loop.print(f"saved to {loop_args.output_dir}: the features are its latents")
        loop.accelerator.end_training()
        return
    loop.run(objective, data, validate, save)


if __name__ == "__main__":
    main()
