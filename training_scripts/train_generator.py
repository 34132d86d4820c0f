"""The class-conditional generator (arXiv 2512.07829, section 5): flow matching of a LightningDiT on an FAE's latents.

    accelerate launch training_scripts/train_generator.py --config training_scripts/configs/lightningdit_xl.yaml

`output_dir` becomes an `FAEDiTPipeline` with the class names; its tokenizer comes without the frozen encoder, which
drawing does not need.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hf_fae import FAEDiTPipeline, FlowMatchEulerMaruyamaScheduler, LightningDiTTransformer2DModel
from hf_fae.images import make_grid
from hf_fae.training.arguments import LoopArguments, parse_arguments
from hf_fae.training.data import DataArguments, ImageData
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.objectives import FlowMatchingObjective
from hf_fae.training.randomness import ImageRandom
from hf_fae.training.tokenizer import load_trained_fae


@dataclass
class GeneratorArguments:
    """The tokenizer, the denoiser, its loss, and how the pipeline draws."""

    fae: str = field(metadata={"help": "Trained AutoencoderFAE: Hub id or local folder."})
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), where the FAE comes without it."}
    )
    patch_size: int = field(default=1, metadata={"help": "Latents per token, along each axis."})
    num_layers: int = field(default=28, metadata={"help": "Layers of the denoiser."})
    num_attention_heads: int = field(default=16, metadata={"help": "Heads of the denoiser."})
    attention_head_dim: int = field(default=72, metadata={"help": "Width of a head."})
    norm_type: Literal["rms_norm", "layer_norm"] = field(default="rms_norm", metadata={"help": "SiT: layer_norm."})
    ff_type: Literal["swiglu", "gelu"] = field(default="swiglu", metadata={"help": "SiT: gelu."})
    use_rope: bool = field(default=True, metadata={"help": "Rotary positions; SiT: false."})
    qk_norm: bool = field(default=False, metadata={"help": "RMSNorm on queries and keys."})
    shift: float = field(default=1.0, metadata={"help": "Time shift s in training and sampling (paper: 0.4)."})
    label_dropout: float = field(default=0.1, metadata={"help": "Share of labels replaced by the null class."})
    sampler: Literal["ode", "sde"] = field(default="ode", metadata={"help": "Euler, or Euler-Maruyama."})
    num_inference_steps: int = field(default=250, metadata={"help": "Default steps of the pipeline."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Default guidance scale of the pipeline."})
    validation_inference_steps: int = field(default=50, metadata={"help": "Steps for the pictures of a validation."})
    grid_images: int = field(default=16, metadata={"help": "Pictures of a validation, spread over the classes."})


def main(argv: list[str] | None = None) -> None:
    args, data_args, loop_args, config = parse_arguments(
        GeneratorArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    if data_args.label_column is None:
        raise ValueError("label_column must name the column of the classes, got None")
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = ImageData(data_args, loop_args.seed)
        vae = load_trained_fae(args.fae, args.image_encoder, data_args.resolution)
    vae.to(loop.device)
    transformer = LightningDiTTransformer2DModel(
        sample_size=data_args.resolution // vae.spatial_compression_ratio,
        patch_size=args.patch_size,
        in_channels=vae.config.latent_channels,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        num_classes=len(data.id2label),
        norm_type=args.norm_type,
        ff_type=args.ff_type,
        use_rope=args.use_rope,
        qk_norm=args.qk_norm,
    ).to(loop.device)
    objective = FlowMatchingObjective(transformer, vae, args.shift, args.label_dropout)
    scheduler_class = {"ode": FlowMatchEulerDiscreteScheduler, "sde": FlowMatchEulerMaruyamaScheduler}[args.sampler]
    pipeline = FAEDiTPipeline(
        vae,
        transformer,
        scheduler_class(shift=1 / args.shift),
        data.id2label,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
    )
    pipeline.set_progress_bar_config(disable=True)
    validation_batches = list(data.validation_batches(loop_args.train_batch_size))

    def validate(step):
        """The loss on the validation split and samples of the classes, with the same noise every time."""
        loss, count = torch.zeros((), device=loop.device), 0
        for batch in validation_batches:
            batch = {name: values.to(loop.device) for name, values in batch.items()}
            random = ImageRandom(loop_args.seed, count, loop.device)
            loss += objective(batch, random)["loss"] * len(batch["class_labels"])
            count += len(batch["class_labels"])
        classes = [i * len(data.id2label) // args.grid_images for i in range(args.grid_images)]
        generator = torch.Generator().manual_seed(loop_args.seed)
        images = pipeline(classes, num_inference_steps=args.validation_inference_steps, generator=generator).images
        return {
            "loss": loss.item() / count,
            "samples": make_grid(images, labels=[data.id2label[label] for label in classes]),
        }

    def save():
        vae.image_encoder = None
        pipeline.save_pretrained(loop_args.output_dir)

    loop.run(objective, data, validate, save)


if __name__ == "__main__":
    main()
