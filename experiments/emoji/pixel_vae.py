"""A baseline tokenizer on pixels alone: diffusers' AutoencoderKL with the latent size of an FAE.

    accelerate launch experiments/emoji/pixel_vae.py --config experiments/emoji/configs/emoji256_vae.yaml \
        --dataset_name ../shared/assets/fluent-emoji --output_dir outputs/emoji256/vae

`output_dir` is an `AutoencoderKL` for `cache_latents.py --vae`; its scaling factor normalises the latents of training
images to unit standard deviation. The loss is mean squared error and KL, without perceptual or adversarial terms, as
for the FAE of docs/experiments/emoji-256.md.
"""

import itertools
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from hf_fae.data.images import DataArguments, ImageData
from hf_fae.objectives.base import Objective, sample_posterior
from hf_fae.objectives.fae import kl_divergence
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.utils.image_metrics import psnr
from hf_fae.utils.parsing import parse_arguments


@dataclass
class VAEArguments:
    """The architecture of the AutoencoderKL, and its loss."""

    latent_channels: int = field(default=32, metadata={"help": "Channels of the latents."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [16, 32, 64, 128, 128],
        metadata={"help": "Width at each resolution; all but the last halve the sides."},
    )
    layers_per_block: int = field(default=1, metadata={"help": "Residual layers at each resolution."})
    kl_weight: float = field(default=1e-4, metadata={"help": "Weight of the KL term; both terms are means."})
    scale_batches: int = field(default=16, metadata={"help": "Batches that the scaling factor is computed from."})


class VAEObjective(Objective):
    """Mean squared error on [0, 1] pixels and KL, both means."""

    def __init__(self, model: AutoencoderKL, kl_weight: float):
        super().__init__(model, [model])
        self.kl_weight = kl_weight

    def forward(self, batch, random):
        images = batch["pixel_values"]
        posterior = self.model.encode(images).latent_dist
        decoded = self.model.decode(sample_posterior(posterior, random)).sample
        reconstruction = F.mse_loss(decoded.float() / 2, images / 2)
        kl = kl_divergence(posterior.mean, posterior.logvar)
        return {"loss": reconstruction + self.kl_weight * kl, "reconstruction": reconstruction, "kl": kl}


def main(argv: list[str] | None = None) -> None:
    args, data_args, loop_args, config = parse_arguments(
        VAEArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    loop = TrainingLoop(loop_args, config)
    data = ImageData(data_args, loop_args.seed)
    levels = len(args.block_out_channels)
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=args.block_out_channels,
        layers_per_block=args.layers_per_block,
        latent_channels=args.latent_channels,
        norm_num_groups=8,
        sample_size=data_args.resolution,
    ).to(loop.device, memory_format=torch.channels_last)
    loop.print(data.describe())
    batches = list(data.validation_batches(loop_args.train_batch_size))

    def validate(step):
        images = [batch["pixel_values"].to(loop.device) for batch in batches]
        scores = [
            psnr(model.decode(model.encode(part).latent_dist.mode()).sample, part) * len(part) for part in images
        ]
        return {"psnr": (sum(scores) / sum(map(len, images))).item()}

    @torch.no_grad()
    def save():
        batches = itertools.islice(data.batches(loop_args.train_batch_size), args.scale_batches)
        with loop.accelerator.autocast():
            latents = [model.encode(b["pixel_values"].to(loop.device)).latent_dist.sample() for b in batches]
        model.register_to_config(scaling_factor=1 / torch.cat(latents).float().std().item())
        model.eval().save_pretrained(loop_args.output_dir)

    loop.run(VAEObjective(model, args.kl_weight), data, validate, save)


if __name__ == "__main__":
    main()
