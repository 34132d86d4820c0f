"""diffusers' AutoencoderKL: a baseline on pixels alone, or VA-VAE, aligned with a frozen encoder (arXiv 2501.01423).

    accelerate launch training_scripts/train_vae.py --config training_scripts/configs/vae/va_vae.yaml

`output_dir` is an `AutoencoderKL` for `cache_latents.py --vae`; its scaling factor normalises the latents of training
images to unit standard deviation. --vae continues one, as VA-VAE's second and third stage do.
"""

import itertools
from dataclasses import dataclass, field

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL

from hf_fae.data.images import DataArguments, ImageData
from hf_fae.encoders import VisionEncoder
from hf_fae.losses.alignment import LatentAlignment
from hf_fae.objectives.reconstruction_losses import ReconstructionArguments, make_losses
from hf_fae.objectives.vae import VAEObjective
from hf_fae.objectives.validation import TokenizerValidation
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class VAEArguments:
    """The architecture of the AutoencoderKL, its KL term, and its alignment."""

    vae: str | None = field(
        default=None, metadata={"help": "AutoencoderKL to continue (Hub id or folder), instead of the shape below."}
    )
    latent_channels: int = field(default=32, metadata={"help": "Channels of the latents."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [128, 128, 256, 256, 512],
        metadata={"help": "Width at each resolution; all but the last halve the sides."},
    )
    layers_per_block: int = field(default=2, metadata={"help": "Residual layers at each resolution."})
    norm_num_groups: int = field(default=32, metadata={"help": "Groups of each normalisation."})
    kl_weight: float = field(default=4e-8, metadata={"help": "Weight of the KL term; all terms are means."})
    alignment_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder) that latents are aligned with; none: no."}
    )
    alignment_weight: float = field(
        default=0.1, metadata={"help": "Gradient of the alignment, relative to that of the reconstruction."}
    )
    cosine_margin: float = field(default=0.5, metadata={"help": "Margin of the cosine of latents and features."})
    distance_margin: float = field(default=0.25, metadata={"help": "Margin of the difference of similarities."})
    scale_batches: int = field(default=16, metadata={"help": "Batches that the scaling factor is computed from."})


def make_model(args: VAEArguments, resolution: int) -> AutoencoderKL:
    """A new VAE, or the one to continue, in fp32."""
    if args.vae is not None:
        return AutoencoderKL.from_pretrained(args.vae).float()
    levels = len(args.block_out_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=args.block_out_channels,
        layers_per_block=args.layers_per_block,
        latent_channels=args.latent_channels,
        norm_num_groups=args.norm_num_groups,
        sample_size=resolution,
    )


def make_alignment(args: VAEArguments, latent_channels: int) -> LatentAlignment | None:
    """The alignment with `alignment_encoder`, if there is one."""
    if args.alignment_encoder is None:
        return None
    encoder = VisionEncoder.from_pretrained(args.alignment_encoder)
    return LatentAlignment(encoder, latent_channels, args.cosine_margin, args.distance_margin)


def main(argv: list[str] | None = None) -> None:
    args, loss_args, data_args, loop_args, config = parse_arguments(
        VAEArguments, ReconstructionArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    # All errors of the arguments are raised before the loop writes anything.
    set_seed(loop_args.seed)
    data = ImageData(data_args, loop_args.seed)
    model = make_model(args, data_args.resolution)
    alignment = make_alignment(args, model.config.latent_channels)
    losses = make_losses(loss_args)
    objective = VAEObjective(model, args.kl_weight, alignment, args.alignment_weight, **losses)

    loop = TrainingLoop(loop_args, config)
    loop.print(data.describe())
    objective.to(loop.device, memory_format=torch.channels_last)
    batch_size = loop_args.train_batch_size
    validation = TokenizerValidation(objective, data.validation_batches(batch_size), loss_args.grid_images)

    @torch.no_grad()
    def save():
        batches = itertools.islice(data.batches(batch_size), args.scale_batches)
        with loop.accelerator.autocast():
            latents = [model.encode(b["pixel_values"].to(loop.device)).latent_dist.sample() for b in batches]
        model.register_to_config(scaling_factor=1 / torch.cat(latents).float().std().item())
        model.eval().save_pretrained(loop_args.output_dir)

    loop.run(objective, data, validation, save)


if __name__ == "__main__":
    run(main)
