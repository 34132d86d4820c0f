"""The base of pipelines with a denoiser: the grid of timesteps, guidance, and the loop from noise to latents."""

import dataclasses
import inspect
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from ..generators.prediction import FLOW_PREDICTIONS, to_velocity
from ..guidance import Guidance
from ..schedulers.euler_maruyama import check_sigmas
from ..schedulers.learned_variance import check_scheduler as check_learned_variance
from ..schedulers.path_check import check_path, check_shift, set_flow_timesteps
from .image_inputs import ImageInput, ImageInputMixin
from .latent_pipeline import LatentPipeline


__all__ = ["DenoisingPipeline", "KnownLatents"]


@dataclasses.dataclass
class KnownLatents:
    """What inpainting keeps: latents of an image, the noise that they are diffused with, and where to generate anew.

    All are (B, C, H, W); `is_unknown` is bool and has one channel.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    is_unknown: torch.Tensor


class DenoisingPipeline(ImageInputMixin, LatentPipeline):
    """Base of pipelines whose `transformer` denoises under a `scheduler`, optionally with a `guidance_transformer`."""

    def init_denoising(
        self,
        guidance_scale: float | list | dict,
        num_inference_steps: int,
        internal_guidance_scale: float | list | dict = 1.0,
    ) -> None:
        """Called by `__init__` once the components are registered; saves the defaults of calls.

        Raises:
            ValueError: components that do not fit each other.
        """
        self.init_components()
        transformer, guide = self.transformer, self.guidance_transformer
        self._trained_shift = 1.0
        if self.scheduler is not None:
            config = self.scheduler.config
            self._trained_shift = config.get("shift", config.get("flow_shift", 1.0))
            if transformer is not None:
                self.check_scheduler()
        if guide is not None and transformer is not None:
            for name in ("in_channels", "num_classes", "caption_channels"):
                ours, theirs = transformer.config.get(name), guide.config.get(name)
                if ours != theirs:
                    raise ValueError(f"guidance_transformer must have {name} {ours} as transformer, got {theirs}")
        self._guidance = Guidance.of(guidance_scale)
        self._internal_guidance = Guidance.of(internal_guidance_scale)
        if transformer is not None:
            _check_base_head(transformer, self._internal_guidance)
        self.register_to_config(
            guidance_scale=dataclasses.asdict(self._guidance),
            num_inference_steps=num_inference_steps,
            internal_guidance_scale=dataclasses.asdict(self._internal_guidance),
        )

    def check_scheduler(self) -> None:
        """Refuse a scheduler that does not sample what the transformers predict.

        Raises:
            ValueError: a DDPM scheduler of other settings or with a transformer that predicts the velocity, or any
                other that does not sample the path of flow matching or has lost the shift of the one in its place.
        """
        scheduler, is_ddpm = self.scheduler, isinstance(self.scheduler, DDPMScheduler)
        if is_ddpm:
            check_learned_variance(scheduler)
        wanted = ("epsilon",) if is_ddpm else FLOW_PREDICTIONS
        for name, model in (("transformer", self.transformer), ("guidance_transformer", self.guidance_transformer)):
            kind = wanted[0] if model is None else model.config.get("prediction_type", "velocity")
            if kind not in wanted:
                names = " or ".join(map(repr, wanted))
                raise ValueError(
                    f"{name} must have prediction_type {names} for a {type(scheduler).__name__}, got {kind!r}"
                )
        if self._predicts_averages(self.transformer) and not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                "scheduler must be a FlowMatchEulerDiscreteScheduler for a transformer with use_meanflow, whose steps "
                f"are straight, got a {type(scheduler).__name__}"
            )
        if not is_ddpm:
            check_path(scheduler)
            check_shift(scheduler, self._trained_shift)

    def prepare_timesteps(self, num_inference_steps: int, sigmas: list[float] | None) -> torch.Tensor:
        """Set the scheduler's grid, uniform in sigma before the scheduler's shift, and return the times of its steps.

        The steps lead from noise level 1 to `config.final_sigma`, where the pipeline has one, else to 0.

        Raises:
            ValueError: a scheduler that does not fit the transformer or `final_sigma`, or steps or sigmas that it does
                not support.
        """
        self.check_scheduler()  # it may have been replaced
        final_sigma, device = self.config.get("final_sigma", 0.0), self._execution_device
        is_euler = isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)
        if final_sigma and not is_euler:
            name = type(self.scheduler).__name__
            raise ValueError(f"final_sigma must be 0 for a {name}, whose last step reaches data, got {final_sigma}")
        if isinstance(self.scheduler, DDPMScheduler):
            if sigmas is not None:
                raise ValueError(
                    f"sigmas must be None for a DDPMScheduler, whose times are whole numbers, got {sigmas}"
                )
            if num_inference_steps < 2:
                raise ValueError(
                    f"num_inference_steps must be at least 2 for a DDPMScheduler, got {num_inference_steps}"
                )
        # The scheduler's own last step goes from the last sigma to 0: it is left out where the grid ends above.
        skipped = 1 if final_sigma else 0
        if sigmas is None:
            set_flow_timesteps(self.scheduler, num_inference_steps, final_sigma, device)
        else:
            grid = [*sigmas, final_sigma] if final_sigma else sigmas
            check_sigmas(grid)
            self.scheduler.set_timesteps(sigmas=grid, device=device)
        return self.scheduler.timesteps[: len(self.scheduler.timesteps) - skipped]

    def prepare_start(
        self,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        image_latents: torch.Tensor | None = None,
        strength: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, KnownLatents | None]:
        """Where denoising starts: from noise, or with an image (or its latents) from a noisy version of it.

        Args:
            noise: (B, C, H, W).
            timesteps: from `prepare_timesteps`.
            image, mask_image, image_latents, strength: as in `__call__`.

        Returns:
            Latents (B, C, H, W), the timesteps from there on, and with a mask what is to be kept.

        Raises:
            ValueError: arguments that do not fit each other; the message names one and its value.
        """
        if image is None and image_latents is None and mask_image is None and strength is None:
            return noise, timesteps, None
        strength = (0.8 if mask_image is None else 1.0) if strength is None else strength
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
        size = tuple(side * self.vae_scale_factor for side in noise.shape[2:])
        known = self.prepare_image_latents(tuple(noise.shape), size, image, image_latents)
        timesteps = timesteps[len(timesteps) - max(1, round(len(timesteps) * strength)) :]
        start = self._diffuse(known, noise, timesteps[0])
        if mask_image is None:
            return start, timesteps, None
        grid = tuple(noise.shape[2:])
        is_unknown = self.prepare_mask(len(noise), mask_image, grid, size).view(-1, 1, *grid)
        return start, timesteps, KnownLatents(known, noise, is_unknown)

    def _diffuse(self, latents, noise, timestep):
        """Latents at the noise level of a timestep, on the path that the scheduler samples."""
        if isinstance(self.scheduler, DDPMScheduler):
            return self.scheduler.add_noise(latents, noise, timestep.reshape(1))
        return torch.lerp(latents, noise, timestep.float() / self.scheduler.config.num_train_timesteps)

    def set_guidance(
        self,
        guidance_scale: float | list | dict | Guidance | None,
        internal_guidance_scale: float | list | dict | Guidance | None,
    ) -> None:
        """Set the guidance of a call, by default the pipeline's own.

        Raises:
            ValueError: no form of guidance, or internal guidance of a transformer without a base head.
        """
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        if internal_guidance_scale is None:
            internal_guidance_scale = self.config.internal_guidance_scale
        internal_guidance = Guidance.of(internal_guidance_scale)
        _check_base_head(self.transformer, internal_guidance)
        self.record(_guidance=Guidance.of(guidance_scale), _internal_guidance=internal_guidance)

    @property
    def guidance(self) -> Guidance:
        """The guidance of the running or latest call."""
        return self._guidance

    @property
    def internal_guidance(self) -> Guidance:
        """The guidance of the running or latest call by the transformer's base head."""
        return self._internal_guidance

    @property
    def guidance_scale(self) -> float | None:
        """The scale if it is constant, for callbacks that expect one; None for a schedule."""
        scales = {scale for _, _, scale in self._guidance.intervals}
        covered = sum(high - low for low, high, _ in self._guidance.intervals)
        return 1.0 if not scales else scales.pop() if len(scales) == 1 and covered == 1 else None

    @property
    def _guidance_scale(self) -> float | None:
        """`guidance_scale`, which a callback can set as in diffusers: for the rest of its call, up to 1 for none."""
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._guidance = Guidance.of(max(value, 1.0))

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance.is_active

    def denoise(
        self,
        latents: torch.Tensor,
        condition: dict[str, torch.Tensor],
        negative_condition: dict[str, torch.Tensor] | None,
        timesteps: torch.Tensor,
        known: KnownLatents | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        attention_kwargs: dict | None = None,
        callback: Callable | None = None,
        callback_tensor_inputs: list[str] = ["latents"],
    ) -> torch.Tensor:
        """Denoise latents (images, C, H, W), under the guidance set by `set_guidance`.

        Args:
            latents: noise.
            condition: arguments of the transformer: class labels, or text embeddings and their mask, with a row per
                image.
            negative_condition: the same for what to guide away from; unused without guidance and with a
                `guidance_transformer`.
            timesteps: from `prepare_timesteps`, or those that are left of them.
            known: what to keep, from `prepare_start`.

        The others are those of `__call__`.
        """
        # Rounded, so that fp32 does not decide on which side of a guidance interval's bound a step lies.
        noise_times = [round(t, 6) for t in (timesteps.double() / self.scheduler.config.num_train_timesteps).tolist()]
        self.record(_num_timesteps=len(timesteps))
        final = self.scheduler.timesteps[-1:] if self.config.get("final_sigma") else timesteps.new_zeros(1)
        ends = torch.cat([timesteps[1:], final])
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        conditions = condition, negative_condition
        step_kwargs = {"return_dict": False, **({"generator": generator} if takes_generator else {})}

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                interval = timestep, ends[step]
                output = self._predict(latents, interval, noise_times[step], conditions, attention_kwargs)
                latents = self.scheduler.step(output, timestep, latents, **step_kwargs)[0]
                if known is not None:
                    is_last = step + 1 == len(timesteps)
                    kept = known.latents if is_last else self._diffuse(known.latents, known.noise, timesteps[step + 1])
                    latents = torch.where(known.is_unknown, latents, kept)
                latents = self.call_back(callback, step, timestep, latents, callback_tensor_inputs)
                progress_bar.update()
        return latents

    def _predict(self, latents, interval, noise_time, conditions, attention_kwargs):
        """The guided velocity or noise of a step from one timestep to the next; a variance after it is the
        conditional one."""
        (condition, negative_condition), kwargs = conditions, {"attention_kwargs": attention_kwargs}
        scale, internal_scale = (each.scale_at(noise_time) for each in (self._guidance, self._internal_guidance))
        if is_doubled := scale != 1 and self.guidance_transformer is None:
            if negative_condition is None:
                raise ValueError(f"guidance_scale must be 1 to the end of a call that began without, got {scale}")
            latents = torch.cat([latents, latents])
            condition = {name: torch.cat([value, negative_condition[name]]) for name, value in condition.items()}
        if internal_scale == 1:
            (prediction,) = self._run(self.transformer, latents, interval, condition, **kwargs)
        else:
            whole, base = self._run(self.transformer, latents, interval, condition, output_base_sample=True, **kwargs)
            prediction = _combine(self._internal_guidance, whole, base, internal_scale, latents.shape[1])
        if scale == 1:
            return prediction
        if is_doubled:
            prediction, negative = prediction.chunk(2)
        else:
            (negative,) = self._run(self.guidance_transformer, latents, interval, condition)
        return _combine(self._guidance, prediction, negative, scale, latents.shape[1])

    @staticmethod
    def _predicts_averages(transformer):
        return transformer is not None and transformer.config.get("use_meanflow", False)

    def _run(self, transformer, latents, interval, condition, **kwargs):
        """The predictions as velocity or noise, in fp32: schedulers keep the dtype from step to step."""
        timestep, end = interval
        if self._predicts_averages(transformer):
            kwargs["timestep_r"] = end.expand(len(latents))
        inputs = latents.to(transformer.dtype), timestep.expand(len(latents))
        outputs = [output.float() for output in transformer(*inputs, **condition, return_dict=False, **kwargs)]
        kind = transformer.config.get("prediction_type", "velocity")
        if kind not in FLOW_PREDICTIONS:
            return outputs
        t = timestep.float() / self.scheduler.config.num_train_timesteps
        return [to_velocity(kind, output, latents.float(), t) for output in outputs]


def _combine(guidance, better, worse, scale, channels):
    """Guides the first `channels`; a variance after them is the better prediction's."""
    guided = guidance.combine(better[:, :channels], worse[:, :channels], scale)
    return guided if better.shape[1] == channels else torch.cat([guided, better[:, channels:]], dim=1)


def _check_base_head(transformer, internal_guidance):
    if internal_guidance.is_active and transformer.config.get("base_head_layer") is None:
        raise ValueError(
            "internal_guidance_scale must be 1 for a transformer without base_head_layer, "
            f"got {internal_guidance.intervals}"
        )
