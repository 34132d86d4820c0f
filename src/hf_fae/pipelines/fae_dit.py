"""Class-conditional images from a denoiser on any tokenizer's latents."""

import dataclasses
import inspect
from collections.abc import Callable

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..generators.dit_dh import DiTDHTransformer2DModel
from ..generators.lightning_dit import LightningDiTTransformer2DModel
from ..guidance import Guidance
from ..schedulers.euler_maruyama import FlowMatchEulerMaruyamaScheduler, check_sigmas
from ..schedulers.learned_variance import check_scheduler
from .class_labels import ClassLabelsMixin
from .latent_pipeline import LatentPipeline, Tokenizer


__all__ = ["FAEDiTPipeline"]

Denoiser = LightningDiTTransformer2DModel | DiTDHTransformer2DModel


class FAEDiTPipeline(LatentPipeline, ClassLabelsMixin):
    """Images of a class: noise -> `transformer` under `scheduler` -> latents -> `vae` -> pictures.

    Args:
        vae: any tokenizer, such as `AutoencoderFAE`, or diffusers' `AutoencoderKL`. A frozen encoder is not needed.
        transformer: a denoiser, `LightningDiTTransformer2DModel` or `DiTDHTransformer2DModel`.
        scheduler: `FlowMatchEulerDiscreteScheduler` (ODE) or `FlowMatchEulerMaruyamaScheduler` (SDE), with the shift
            that the denoiser was trained with; for one that predicts the noise (DiT) a `DDPMScheduler` with its betas
            and a learned variance, see `learned_variance_scheduler`.
        id2label: names of the classes, `{id: name}`.
        guidance_scale, num_inference_steps: what calls use by default, saved with the pipeline: the settings that go
            with the weights. Forms as in `Guidance.of`.
        guidance_transformer: a weaker denoiser of the same latents and classes, smaller or trained for a shorter time.
            With one, guidance leads away from what it predicts of the same class (AutoGuidance, arXiv 2406.02507),
            instead of from the unconditional prediction.
    """

    model_cpu_offload_seq = "transformer->guidance_transformer->vae"
    _optional_components = ["guidance_transformer"]

    def __init__(
        self,
        vae: Tokenizer,
        transformer: Denoiser,
        scheduler: FlowMatchEulerDiscreteScheduler | FlowMatchEulerMaruyamaScheduler | DDPMScheduler,
        id2label: dict | None = None,
        guidance_scale: float | list | dict = 1.0,
        num_inference_steps: int = 250,
        guidance_transformer: Denoiser | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae, transformer=transformer, scheduler=scheduler, guidance_transformer=guidance_transformer
        )
        self.init_latents()
        if transformer is not None and scheduler is not None:
            _check_kinds(transformer, scheduler, guidance_transformer)
        if guidance_transformer is not None and transformer is not None:
            for name in ("in_channels", "num_classes"):
                ours, theirs = transformer.config[name], guidance_transformer.config[name]
                if ours != theirs:
                    raise ValueError(f"guidance_transformer must have {name} {ours} as transformer, got {theirs}")
        self.register_labels(id2label)
        self.register_to_config(
            guidance_scale=dataclasses.asdict(Guidance.of(guidance_scale)), num_inference_steps=num_inference_steps
        )
        self._guidance = Guidance.of(guidance_scale)

    def prepare_timesteps(self, num_inference_steps: int, sigmas: list[float] | None) -> torch.Tensor:
        """Set the scheduler's grid, uniform in sigma before the scheduler's shift."""
        if isinstance(self.scheduler, DDPMScheduler):
            if sigmas is not None:
                raise ValueError(
                    f"sigmas must be None for a DDPMScheduler, whose times are whole numbers, got {sigmas}"
                )
            if num_inference_steps < 2:
                raise ValueError(
                    f"num_inference_steps must be at least 2 for a DDPMScheduler, got {num_inference_steps}"
                )
        elif sigmas is None and isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # Left to itself this scheduler shifts twice (diffusers#13243).
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        else:
            check_sigmas(sigmas)
            self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
        return self.scheduler.timesteps

    @property
    def guidance(self) -> Guidance:
        """Of the running or latest call."""
        return self._guidance

    @property
    def guidance_scale(self) -> float | None:
        """The scale where it is one for all times, as many callbacks want it; None for a schedule."""
        scales = {scale for _, _, scale in self._guidance.intervals}
        covered = sum(high - low for low, high, _ in self._guidance.intervals)
        return 1.0 if not scales else scales.pop() if len(scales) == 1 and covered == 1 else None

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance.is_active

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | list | dict | Guidance | None = None,
        negative_class_labels: int | str | list[int | str] | None = None,
        num_images_per_prompt: int = 1,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[["FAEDiTPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            class_labels: class ids, names from `id2label`, or a list of either.
            height, width: of the images in pixels; by default those of training.
            num_inference_steps: model evaluations; by default the pipeline's own.
            guidance_scale: one scale, `[(t_low, t_high, scale), ...]` over noise times, or a `Guidance`; by default
                the pipeline's own. Where the scale is 1 the conditional pass is the only one.
            negative_class_labels: guide away from these classes (one, or one for each label), instead of from the
                unconditional prediction.
            num_images_per_prompt: images for each label; those of a label follow each other.
            sigmas: own noise levels, falling within (0, 1], before the scheduler's shift.
            generator: of all random numbers; with a list, one for each image, an image is the same in any batch.
            latents: start from these instead of noise (images, C, H, W).
            output_type: `"pil"`, `"np"` (B, H, W, 3) in [0, 1], `"pt"` (B, 3, H, W) in [0, 1], or `"latent"`.
            return_dict: return an `ImagePipelineOutput` instead of a tuple.
            attention_kwargs: handed to the transformer; `{"scale": s}` scales LoRA layers.
            callback_on_step_end: called as `(pipe, step, timestep, tensors)` after each step; what it returns
                replaces the tensors.
            callback_on_step_end_tensor_inputs: names of these tensors; `"latents"`.

        Returns:
            `.images`.

        Raises:
            ValueError: an argument that does not fit; the message names it and its value.
        """
        if self.guidance_transformer is not None and negative_class_labels is not None:
            raise ValueError(
                "negative_class_labels must be None with a guidance_transformer, which predicts the same classes, "
                f"got {negative_class_labels!r}"
            )
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        self.check_inputs(
            height,
            width,
            output_type,
            callback_on_step_end_tensor_inputs,
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
        )
        guidance = self._guidance = Guidance.of(
            self.config.guidance_scale if guidance_scale is None else guidance_scale
        )
        self._interrupt = False
        labels, negative_labels = self.prepare_labels(class_labels, negative_class_labels, num_images_per_prompt)
        latents = self.prepare_latents(len(labels), height, width, generator, latents)
        timesteps = self.prepare_timesteps(num_inference_steps, sigmas)
        # Rounded, so that fp32 does not decide on which side of a guidance interval's bound a step lies.
        noise_times = [round(t, 6) for t in (timesteps.double() / self.scheduler.config.num_train_timesteps).tolist()]
        self._num_timesteps = len(timesteps)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"return_dict": False, **({"generator": generator} if takes_generator else {})}

        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                scale = guidance.scale_at(noise_times[step])
                output = self._predict(latents, timestep, labels, attention_kwargs, negative_labels, guidance, scale)
                latents = self.scheduler.step(output, timestep, latents, **step_kwargs)[0]
                latents = self.call_back(
                    callback_on_step_end, step, timestep, latents, callback_on_step_end_tensor_inputs
                )
                progress_bar.update()

        images = self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, latents, timestep, labels, attention_kwargs, negative_labels, guidance, scale):
        """The guided velocity or noise; the variance behind it is the conditional one."""
        inputs = (latents, timestep, labels)
        if scale == 1:
            return _run(self.transformer, *inputs, attention_kwargs=attention_kwargs)
        if self.guidance_transformer is not None:
            prediction = _run(self.transformer, *inputs, attention_kwargs=attention_kwargs)
            negative = _run(self.guidance_transformer, *inputs)
            return _combine(guidance, prediction, negative, scale, latents.shape[1])
        both = (torch.cat([latents, latents]), timestep, torch.cat([labels, negative_labels]))
        predictions = _run(self.transformer, *both, attention_kwargs=attention_kwargs).chunk(2)
        return _combine(guidance, *predictions, scale, latents.shape[1])

    def add_classes(self, rows: dict[str, torch.Tensor]) -> None:
        """As `ClassLabelsMixin.add_classes`.

        Raises:
            ValueError: there is a `guidance_transformer`, which would not have them.
        """
        self._check_single_table()
        super().add_classes(rows)

    def remove_classes(self, names: list[str]) -> None:
        """As `ClassLabelsMixin.remove_classes`.

        Raises:
            ValueError: there is a `guidance_transformer`, which would keep them.
        """
        self._check_single_table()
        super().remove_classes(names)

    def _check_single_table(self):
        if self.guidance_transformer is not None:
            raise ValueError(
                "guidance_transformer must be None for classes to be added or removed, "
                f"got a {type(self.guidance_transformer).__name__}"
            )


def _combine(guidance, conditional, negative, scale, channels):
    guided = guidance.combine(conditional[:, :channels], negative[:, :channels], scale)
    return guided if conditional.shape[1] == channels else torch.cat([guided, conditional[:, channels:]], dim=1)


def _check_kinds(transformer, scheduler, guidance_transformer):
    is_ddpm = isinstance(scheduler, DDPMScheduler)
    if is_ddpm:
        check_scheduler(scheduler)
    wanted = "epsilon" if is_ddpm else "velocity"
    for name, model in (("transformer", transformer), ("guidance_transformer", guidance_transformer)):
        kind = wanted if model is None else model.config.get("prediction_type", "velocity")
        if kind != wanted:
            raise ValueError(
                f"{name} must have prediction_type {wanted!r} for a {type(scheduler).__name__}, got {kind!r}"
            )


def _run(transformer, latents, timestep, labels, **kwargs):
    """In fp32: schedulers keep the dtype of what the model gives from step to step."""
    timestep = timestep.expand(len(labels))
    return transformer(latents.to(transformer.dtype), timestep, labels, return_dict=False, **kwargs)[0].float()
