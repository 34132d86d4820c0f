"""Class-conditional images from a denoiser on any tokenizer's latents."""

import dataclasses
import inspect
from collections.abc import Callable

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from ..autoencoders.fae import AutoencoderFAE
from ..generators.lightning_dit import LightningDiTTransformer2DModel
from ..guidance import Guidance
from ..hub import ModelCardMixin
from ..latents import check_finite
from ..layers.positions import grid_size
from ..schedulers.euler_maruyama import FlowMatchEulerMaruyamaScheduler, check_sigmas
from .class_labels import ClassLabelsMixin
from .lora import TransformerLoraMixin


__all__ = ["FAEDiTPipeline"]


class FAEDiTPipeline(ModelCardMixin, DiffusionPipeline, TransformerLoraMixin, ClassLabelsMixin):
    """Images of a class: noise -> `transformer` under `scheduler` -> latents -> `vae` -> pictures.

    Args:
        vae: a tokenizer, such as `AutoencoderFAE`. Its frozen encoder is not needed.
        transformer: a denoiser, such as `LightningDiTTransformer2DModel`.
        scheduler: `FlowMatchEulerDiscreteScheduler` (ODE) or `FlowMatchEulerMaruyamaScheduler` (SDE), with the shift
            that the denoiser was trained with.
        id2label: names of the classes, `{id: name}`.
        guidance_scale, num_inference_steps: what calls use by default, saved with the pipeline: the settings that go
            with the weights. Forms as in `Guidance.of`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderFAE,
        transformer: LightningDiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler | FlowMatchEulerMaruyamaScheduler,
        id2label: dict | None = None,
        guidance_scale: float | list | dict = 1.0,
        num_inference_steps: int = 250,
    ):
        super().__init__()
        if vae is not None and transformer is not None:
            channels = vae.config.latent_channels
            if transformer.config.in_channels != channels:
                raise ValueError(
                    f"transformer must have in_channels {channels}, as the vae has latent_channels, "
                    f"got {transformer.config.in_channels}"
                )
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_labels(id2label)
        self.register_to_config(
            guidance_scale=dataclasses.asdict(Guidance.of(guidance_scale)), num_inference_steps=num_inference_steps
        )
        # Without a vae (`output_type="latent"`) height and width count latents.
        self.vae_scale_factor = 1 if vae is None else vae.spatial_compression_ratio
        self.image_processor = VaeImageProcessor(do_resize=False)
        self._guidance = Guidance.of(guidance_scale)
        self._interrupt = False

    def check_inputs(self, height, width, num_inference_steps, num_images_per_prompt, output_type, tensor_inputs):
        """Refuse what cannot be drawn, before anything is computed; see `__call__`."""
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        for name, side in (("height", height), ("width", width)):
            if side is not None and (side < multiple or side % multiple):
                raise ValueError(f"{name} must be a positive multiple of {multiple}, got {side}")
        for name, number in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a positive whole number, got {number!r}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )

    def prepare_latents(
        self,
        batch_size: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise (batch_size, C, H, W) in fp32: drawn, or `latents` as given.

        Raises:
            ValueError: latents of another shape or not finite, or another number of generators.
        """
        default_height, default_width = grid_size(self.transformer.config.sample_size)
        ratio = self.vae_scale_factor
        shape = (
            batch_size,
            self.transformer.config.in_channels,
            default_height if height is None else height // ratio,
            default_width if width is None else width // ratio,
        )
        generator = list(generator) if isinstance(generator, tuple) else generator
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator must be a list of {batch_size}, one for each image, got {len(generator)}")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        check_finite("latents", latents)
        return latents.to(self._execution_device, torch.float32)

    def prepare_timesteps(self, num_inference_steps: int, sigmas: list[float] | None) -> torch.Tensor:
        """Set the scheduler's grid, uniform in sigma before the scheduler's shift."""
        if sigmas is None and isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # Left to itself this scheduler shifts twice (diffusers#13243).
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        if sigmas is None:
            self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        else:
            check_sigmas(sigmas)
            self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
        return self.scheduler.timesteps

    def decode(self, latents: torch.Tensor, output_type: str):
        """Pictures of latents (B, C, H, W), in the form that `output_type` names."""
        if output_type == "latent":
            return latents
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(images, output_type=output_type)

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

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop; what is there is decoded."""
        return self._interrupt

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
                the pipeline's own. Where the scale is 1 no unconditional pass is run.
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
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        self.check_inputs(
            height, width, num_inference_steps, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs
        )
        guidance = self._guidance = Guidance.of(
            self.config.guidance_scale if guidance_scale is None else guidance_scale
        )
        self._interrupt = False
        device = self._execution_device

        label_ids = self.label_ids(class_labels, "class_labels")
        labels = torch.tensor(label_ids, device=device).repeat_interleave(num_images_per_prompt)
        if negative_class_labels is None:
            negative_labels = torch.full_like(labels, self.transformer.config.num_classes)
        else:
            negative_ids = self.label_ids(negative_class_labels, "negative_class_labels")
            if len(negative_ids) not in (1, len(label_ids)):
                raise ValueError(
                    f"negative_class_labels must be one class or {len(label_ids)} as class_labels, "
                    f"got {len(negative_ids)}"
                )
            negative_labels = torch.tensor(negative_ids, device=device).expand(len(label_ids))
            negative_labels = negative_labels.repeat_interleave(num_images_per_prompt)

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
                velocity = self._predict(latents, timestep, labels, attention_kwargs, negative_labels, guidance, scale)
                latents = self.scheduler.step(velocity, timestep, latents, **step_kwargs)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    latents = (callback_on_step_end(self, step, timestep, tensors) or {}).get("latents", latents)
                progress_bar.update()

        images = self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, latents, timestep, labels, attention_kwargs, negative_labels, guidance, scale):
        """The guided velocity, in fp32: schedulers keep the dtype of what the model gives from step to step."""
        if scale != 1:
            latents = torch.cat([latents, latents])
            labels = torch.cat([labels, negative_labels])
        velocity = self.transformer(
            latents.to(self.transformer.dtype),
            timestep.expand(len(labels)),
            labels,
            attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0].float()
        return guidance.combine(*velocity.chunk(2), scale) if scale != 1 else velocity
