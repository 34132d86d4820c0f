"""A class-conditional denoiser on latents (arXiv 2512.07829, section 5): flow matching, or DDPM.

    accelerate launch training_scripts/train_generator.py \\
        --config training_scripts/configs/denoisers/lightningdit_xl.yaml

--dataset_name names images or their latents, cached by cache_latents.py. --pipeline continues from a published
generator and adds the classes that it does not know.

`output_dir` becomes an `FAEDiTPipeline` with the class names; its tokenizer is saved without the frozen encoder, which
generation does not need.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from hf_fae import (
    DiTDHTransformer2DModel,
    FAEDiTPipeline,
    FlowMatchEulerMaruyamaScheduler,
    LightningDiTTransformer2DModel,
    RAEv2Transformer2DModel,
)
from hf_fae.data.conditions import prepare_condition
from hf_fae.data.images import DataArguments
from hf_fae.data.opening import check_pipeline_arguments, latent_sample_size, open_pipeline, open_training_data
from hf_fae.data.protocol import GeneratorData
from hf_fae.layers.positions import grid_size
from hf_fae.objectives.flow_matching import dimension_shift
from hf_fae.objectives.from_pipeline import objective_of
from hf_fae.objectives.generator import GeneratorArguments
from hf_fae.objectives.repa import REPAArguments, add_repa
from hf_fae.objectives.validation import GeneratorValidation
from hf_fae.schedulers.learned_variance import learned_variance_scheduler
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.publish import save_without_encoder
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class DenoiserArguments(GeneratorArguments):
    """The tokenizer, the denoiser, its loss, and the defaults of the pipeline."""

    denoiser: Literal["lightningdit", "dit_dh", "raev2"] = field(
        default="lightningdit", metadata={"help": "LightningDiT (or SiT, DiT); with a wide head DiT^DH or RAEv2's."}
    )
    patch_size: int = field(default=1, metadata={"help": "Latents per token, along each axis."})
    num_layers: int = field(default=28, metadata={"help": "Layers of the denoiser, before a wide head."})
    num_attention_heads: int = field(default=16, metadata={"help": "Heads of the denoiser."})
    attention_head_dim: int = field(default=72, metadata={"help": "Width of a head."})
    head_num_layers: int = field(default=2, metadata={"help": "DiT^DH, RAEv2: layers of the head."})
    head_num_attention_heads: int = field(default=16, metadata={"help": "DiT^DH, RAEv2: heads of the head."})
    head_attention_head_dim: int = field(default=128, metadata={"help": "DiT^DH, RAEv2: width of such a head."})
    norm_type: Literal["rms_norm", "layer_norm"] = field(
        default="rms_norm", metadata={"help": "SiT, DiT: layer_norm."}
    )
    ff_type: Literal["swiglu", "gelu"] = field(default="swiglu", metadata={"help": "SiT, DiT: gelu."})
    use_rope: bool = field(default=True, metadata={"help": "Rotary positions; SiT, DiT: false."})
    qk_norm: bool = field(default=False, metadata={"help": "RMSNorm on queries and keys; RAEv2 has it."})
    prediction_type: Literal["velocity", "sample", "epsilon"] = field(
        default="velocity",
        metadata={"help": "sample: clean latents (RAEv2); epsilon: noise and a variance, with DDPM's betas (DiT)."},
    )
    base_head_layer: int | None = field(
        default=None, metadata={"help": "Blocks before a base head, for internal guidance (RAEv2: 8); none: no head."}
    )
    use_meanflow: bool = field(
        default=False,
        metadata={"help": "Predict average velocities, for few steps (MeanFlow); see train_few_steps.py."},
    )
    base_weight: float = field(default=1.0, metadata={"help": "Weight of the loss of the base head."})
    shift: float = field(default=1.0, metadata={"help": "Time shift s in training and sampling (FAE: 0.4)."})
    dimension_shift: bool = field(
        default=False, metadata={"help": "Derive s from the size of the latents instead, as RAE does."}
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = field(
        default="uniform", metadata={"help": "Noise times of training, before the shift (LightningDiT: logit_normal)."}
    )
    cosine_weight: float = field(
        default=0.0, metadata={"help": "Weight of the loss on the velocity's direction (LightningDiT: 1)."}
    )
    sampler: Literal["ode", "sde"] = field(default="ode", metadata={"help": "Euler, or Euler-Maruyama."})
    num_inference_steps: int = field(default=250, metadata={"help": "Default steps of the pipeline."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Default guidance scale of the pipeline."})
    internal_guidance_scale: float = field(
        default=1.0, metadata={"help": "Default scale of the pipeline's guidance by the base head (RAEv2: 1.78)."}
    )
    internal_guidance_t_low: float = field(
        default=0.0, metadata={"help": "Noise time above which the pipeline uses that scale (RAEv2: 0.1)."}
    )
    validation_inference_steps: int = field(default=50, metadata={"help": "Steps of validation samples."})


def new_pipeline(args: DenoiserArguments, data: GeneratorData) -> FAEDiTPipeline:
    """A pipeline with an untrained denoiser for the classes of the data."""
    vae = data.load_tokenizer(args.vae, args.image_encoder)
    common = {
        "sample_size": latent_sample_size(data, vae),
        "patch_size": args.patch_size,
        "in_channels": vae.config.latent_channels,
        "num_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "attention_head_dim": args.attention_head_dim,
        "num_classes": len(data.class_names()),
        "prediction_type": args.prediction_type,
        "base_head_layer": args.base_head_layer,
        "use_meanflow": args.use_meanflow,
    }
    head = {
        "head_num_layers": args.head_num_layers,
        "head_num_attention_heads": args.head_num_attention_heads,
        "head_attention_head_dim": args.head_attention_head_dim,
    }
    if args.denoiser == "raev2":
        transformer = RAEv2Transformer2DModel(**head, **common)
    elif args.denoiser == "dit_dh":
        transformer = DiTDHTransformer2DModel(qk_norm=args.qk_norm, **head, **common)
    else:
        transformer = LightningDiTTransformer2DModel(
            norm_type=args.norm_type,
            ff_type=args.ff_type,
            use_rope=args.use_rope,
            qk_norm=args.qk_norm,
            **common,
        )
    shift = args.shift
    if args.dimension_shift:
        shift = dimension_shift(common["in_channels"], *grid_size(common["sample_size"]))
    if args.prediction_type == "epsilon":
        scheduler = learned_variance_scheduler("linear")
    else:
        samplers = {"ode": FlowMatchEulerDiscreteScheduler, "sde": FlowMatchEulerMaruyamaScheduler}
        scheduler = samplers[args.sampler](shift=1 / shift)
    return FAEDiTPipeline(
        vae,
        transformer,
        scheduler,
        data.id2label,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        internal_guidance_scale=[(args.internal_guidance_t_low, 1.0, args.internal_guidance_scale)],
    )


def check_arguments(args: DenoiserArguments) -> None:
    if args.dimension_shift and args.shift != 1:
        raise ValueError(f"shift must be 1 with dimension_shift, which replaces it, got {args.shift}")
    if args.base_head_layer is None and args.internal_guidance_scale != 1:
        raise ValueError(
            f"internal_guidance_scale must be 1 without base_head_layer, got {args.internal_guidance_scale}"
        )
    if args.use_meanflow:
        others = {"timestep_sampling": "uniform", "cosine_weight": 0.0, "sampler": "ode", "base_head_layer": None}
        for name, default in others.items():
            if getattr(args, name) != default:
                raise ValueError(f"{name} must be {default} with use_meanflow, got {getattr(args, name)}")
    if args.prediction_type == "epsilon":
        others = {"denoiser": "lightningdit", "shift": 1.0, "dimension_shift": False, "sampler": "ode"}
        others |= {"timestep_sampling": "uniform", "cosine_weight": 0.0, "use_meanflow": False}
        for name, default in others.items():
            if getattr(args, name) != default:
                raise ValueError(f"{name} must be {default} for prediction_type epsilon, got {getattr(args, name)}")


def without_effect(args: DenoiserArguments, pipeline: FAEDiTPipeline) -> dict:
    """Further arguments that a published pipeline overrules, with the values that they may have."""
    if isinstance(pipeline.scheduler, DDPMScheduler):
        return {"timestep_sampling": "uniform", "cosine_weight": 0.0, "dimension_shift": False}
    config = pipeline.transformer.config
    shift = dimension_shift(config.in_channels, *grid_size(config.sample_size))
    return {"dimension_shift": abs(1 / pipeline.scheduler.config.shift - shift) < 1e-6}


def main(argv: list[str] | None = None) -> None:
    args, repa_args, data_args, loop_args, config = parse_arguments(
        DenoiserArguments, REPAArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    check_arguments(args)
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        opened = open_training_data(data_args, loop_args.seed)
        if args.pipeline is None:
            pipeline = new_pipeline(args, opened)
        else:
            components = {"vae": args.vae, "image_encoder": args.image_encoder}
            pipeline = open_pipeline(opened, args.pipeline, FAEDiTPipeline, **components)
            check_pipeline_arguments(args, pipeline, **without_effect(args, pipeline))
    loop.print(opened.describe())
    data, condition = prepare_condition(pipeline, opened)
    loop.print(condition.describe())
    flow_matching = {"timestep_sampling": args.timestep_sampling, "cosine_weight": args.cosine_weight}
    objective = objective_of(pipeline, condition, args.label_dropout, args.base_weight, **flow_matching)
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
