"""Few-step generation: turn a trained denoiser into one of average velocities (MeanFlow, arXiv 2505.13447).

    accelerate launch training_scripts/train_few_steps.py --config training_scripts/configs/few_steps/few_steps.yaml \\
        --pipeline user/fae-dinov2-g-xl-256 --dataset_name outputs/latents-imagenet-dinov2-giant

The denoiser starts as it is and learns to jump from noise to data in one, two or four steps. --velocity data learns
from the data alone, own is improved MeanFlow, teacher distils the pipeline. Guidance becomes part of the model by
--omega and --kappa. A pipeline that this script or `train_generator.py --use_meanflow` has trained is continued.

`output_dir` becomes a pipeline of the same class; its tokenizer is saved without the frozen encoder.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from accelerate.utils import set_seed
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from hf_fae.data.conditions import prepare_condition
from hf_fae.data.images import DataArguments
from hf_fae.data.opening import open_pipeline, open_training_data
from hf_fae.guidance import Guidance
from hf_fae.objectives.mean_flow import MeanFlowObjective, TimePairs
from hf_fae.objectives.repa import REPAArguments, add_repa
from hf_fae.objectives.validation import GeneratorValidation
from hf_fae.pipelines.denoising import DenoisingPipeline
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.publish import save_without_encoder
from hf_fae.utils.command_line import run
from hf_fae.utils.parsing import parse_arguments


@dataclass
class FewStepsArguments:
    """The denoiser to start from, the velocity that it averages, and guidance."""

    pipeline: str = field(metadata={"help": "Pipeline with a denoiser, but no DDPM: Hub id or folder."})
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), for a pipeline saved without it."}
    )
    text_encoder: str | None = field(
        default=None, metadata={"help": "Text encoder (Hub id or folder), for a pipeline saved without it."}
    )
    velocity: Literal["data", "own", "teacher"] = field(
        default="own",
        metadata={
            "help": "data: MeanFlow; own: improved MeanFlow, along the model's own velocity; teacher: that of the "
            "pipeline as it is now."
        },
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = field(
        default="logit_normal", metadata={"help": "Distribution of both times, before the shift (MF-RAE: uniform)."}
    )
    time_mean: float = field(default=-0.4, metadata={"help": "Mean of the logit-normal times, before the shift."})
    time_std: float = field(default=1.0, metadata={"help": "Their standard deviation."})
    instant_share: float = field(
        default=0.75, metadata={"help": "Share of images whose interval is a point (improved MeanFlow: 0.5)."}
    )
    adaptive_power: float = field(default=1.0, metadata={"help": "Power p of the loss's adaptive weight; 0: none."})
    omega: float = field(default=1.0, metadata={"help": "Guidance in the target. Its scale is omega / (1 - kappa)."})
    kappa: float = field(default=0.0, metadata={"help": "Share of the model's own velocity in the target."})
    guidance_t_low: float = field(default=0.0, metadata={"help": "Lowest noise time with guidance."})
    guidance_t_high: float = field(default=1.0, metadata={"help": "Highest noise time with guidance."})
    label_dropout: float = field(
        default=0.1, metadata={"help": "Share of labels or captions replaced by the null class or the empty text."}
    )
    num_inference_steps: int = field(default=1, metadata={"help": "Default steps of the pipeline, and of validation."})
    grid_images: int = field(default=16, metadata={"help": "Samples per validation, spread over classes or captions."})


def prepare_pipeline(pipeline: DenoisingPipeline, args: FewStepsArguments) -> None:
    """Give the pipeline a denoiser of average velocities, straight steps, and no guidance but that of the denoiser.

    Raises:
        ValueError: a pipeline of another kind of denoiser, or with a second one; no steps.
    """
    if args.num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {args.num_inference_steps}")
    if isinstance(pipeline.scheduler, DDPMScheduler):
        raise ValueError(f"pipeline {args.pipeline!r} must be one of flow matching, got a DDPMScheduler")
    if pipeline.guidance_transformer is not None:
        raise ValueError(f"pipeline {args.pipeline!r} must have no guidance_transformer: save it with None")
    pipeline.transformer.enable_meanflow()
    if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        config = pipeline.scheduler.config
        shift = config.get("flow_shift", config.get("shift", 1.0))
        pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=shift))
    no_guidance = dataclasses.asdict(Guidance())
    pipeline.register_to_config(
        guidance_scale=no_guidance,
        internal_guidance_scale=no_guidance,
        num_inference_steps=args.num_inference_steps,
    )


def main(argv: list[str] | None = None) -> None:
    args, repa_args, data_args, loop_args, config = parse_arguments(
        FewStepsArguments, REPAArguments, DataArguments, LoopArguments, argv=argv, description=__doc__
    )
    # All errors of the arguments are raised before the loop writes anything.
    opened = open_training_data(data_args, loop_args.seed)
    components = {"image_encoder": args.image_encoder, "text_encoder": args.text_encoder}
    pipeline = open_pipeline(opened, args.pipeline, DenoisingPipeline, **components)
    data, condition = prepare_condition(pipeline, opened)
    teacher = copy.deepcopy(pipeline.transformer) if args.velocity == "teacher" else None
    set_seed(loop_args.seed)  # of the new embedding
    prepare_pipeline(pipeline, args)
    objective = MeanFlowObjective(
        pipeline.transformer,
        pipeline.vae,
        args.label_dropout,
        condition,
        times=TimePairs(
            args.time_mean,
            args.time_std,
            args.instant_share,
            shift=1 / pipeline.scheduler.config.shift,
            timestep_sampling=args.timestep_sampling,
        ),
        improved=args.velocity == "own",
        teacher=teacher,
        adaptive_power=args.adaptive_power,
        omega=args.omega,
        kappa=args.kappa,
        guidance_interval=(args.guidance_t_low, args.guidance_t_high),
    )
    data = add_repa(objective, repa_args, data, opened)

    loop = TrainingLoop(loop_args, config)
    loop.print(f"{opened.describe()}\n{condition.describe()}")
    objective.to(loop.device)
    validation = GeneratorValidation(
        pipeline,
        objective,
        data.validation_batches(loop_args.train_batch_size),
        grid_images=args.grid_images,
        seed=loop_args.seed,
        num_inference_steps=args.num_inference_steps,
    )
    loop.run(objective, data, validation, save=partial(save_without_encoder, pipeline, loop_args.output_dir))


if __name__ == "__main__":
    run(main)
