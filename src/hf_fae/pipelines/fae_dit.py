"""Class-conditional images from a denoiser on any tokenizer's latents."""

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..generators.dit_dh import DiTDHTransformer2DModel
from ..generators.lightning_dit import LightningDiTTransformer2DModel
from ..generators.raev2 import RAEv2Transformer2DModel
from ..guidance import Guidance
from ..schedulers.euler_maruyama import FlowMatchEulerMaruyamaScheduler
from .calls import separate_call
from .class_labels import ClassLabelsMixin
from .denoising import DenoisingPipeline
from .image_inputs import ImageInput
from .latent_pipeline import Tokenizer


__all__ = ["FAEDiTPipeline"]

Denoiser = LightningDiTTransformer2DModel | DiTDHTransformer2DModel | RAEv2Transformer2DModel


class FAEDiTPipeline(DenoisingPipeline, ClassLabelsMixin):
    """Class-conditional images: noise -> `transformer` under `scheduler` -> latents -> `vae` -> images.

    Args:
        vae: any tokenizer, such as `AutoencoderFAE`, or diffusers' `AutoencoderKL`. A frozen encoder is not needed.
        transformer: a denoiser, `LightningDiTTransformer2DModel`, `DiTDHTransformer2DModel` or
            `RAEv2Transformer2DModel`.
        scheduler: `FlowMatchEulerDiscreteScheduler` (ODE) or `FlowMatchEulerMaruyamaScheduler` (SDE), with the shift
            that the denoiser was trained with; for one that predicts the noise (DiT) a `DDPMScheduler` with its betas
            and a learned variance, see `learned_variance_scheduler`.
        id2label: names of the classes, `{id: name}`.
        guidance_scale, num_inference_steps: defaults of calls, saved with the pipeline: the settings that belong to
            the weights. Forms as in `Guidance.of`.
        guidance_transformer: a weaker denoiser of the same latents and classes, smaller or trained for a shorter time.
            With one, guidance leads away from its prediction for the same class (AutoGuidance, arXiv 2406.02507),
            instead of from the unconditional prediction.
        final_sigma: noise level, before the scheduler's shift, at which an ODE scheduler stops. 0 is data; RAE's
            code stops at 0.001.
        internal_guidance_scale: default of calls, saved with the pipeline: guidance away from the prediction of the
            base head of a transformer with `base_head_layer`. Forms as in `Guidance.of`; RAEv2 samples with
            `[(0.1, 1.0, 1.78)]`.

    Raises:
        ValueError: components that do not fit each other, unknown classes, or a `final_sigma` outside [0, 1).
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
        final_sigma: float = 0.0,
        internal_guidance_scale: float | list | dict = 1.0,
    ):
        super().__init__()
        self.register_modules(
            vae=vae, transformer=transformer, scheduler=scheduler, guidance_transformer=guidance_transformer
        )
        self.init_denoising(guidance_scale, num_inference_steps, internal_guidance_scale)
        if not 0 <= final_sigma < 1:
            raise ValueError(f"final_sigma must be at least 0 and below 1, got {final_sigma}")
        self.register_to_config(final_sigma=final_sigma)
        self.register_labels(id2label)

    @torch.no_grad()
    @separate_call
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | list | dict | Guidance | None = None,
        internal_guidance_scale: float | list | dict | Guidance | None = None,
        negative_class_labels: int | str | list[int | str] | None = None,
        num_images_per_prompt: int = 1,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        image_latents: torch.Tensor | None = None,
        strength: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[["FAEDiTPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: class ids, names from `id2label`, or a list of either.
            height, width: of the images in pixels; by default those of training.
            num_inference_steps: model evaluations; by default the pipeline's own.
            guidance_scale: one scale, `[(t_low, t_high, scale), ...]` over noise times, or a `Guidance`; by default
                the pipeline's own. Where the scale is 1 the conditional pass is the only one.
            internal_guidance_scale: the same for guidance by the transformer's base head, which needs no further pass;
                with both, each branch is guided by it first.
            negative_class_labels: guide away from these classes (one, or one for each label), instead of from the
                unconditional prediction.
            num_images_per_prompt: images per label; those of a label are consecutive.
            sigmas: own noise levels, falling within (0, 1], before the scheduler's shift.
            generator: of all random numbers; with a list, one per image, an image is the same in any batch.
            latents: the noise (images, C, H, W), instead of a random one.
            image: image to image: start from a noisy version of these images, one or one for each output, of the size
                of the outputs. Requires the tokenizer's frozen encoder, if it has one.
            mask_image: inpainting: what of `image` to generate anew, white in images and 1 in tensors (images or 1,
                height, width): every latent with such a pixel. Of the size of the images or of the grid of latents;
                for 1-D tokenizers (MAETok), of the grid of latents alone.
            image_latents: latents instead of `image` (images or 1, C, H, W), as the tokenizer's `encode` returns them.
            strength: how much of the image to change, in (0, 1]: the share of the steps that is run, from that noise
                level on. By default 0.8, with a mask 1.
            output_type: `"pil"`, `"np"` (B, H, W, 3) in [0, 1], `"pt"` (B, 3, H, W) in [0, 1], or `"latent"`.
            return_dict: return an `ImagePipelineOutput` instead of a tuple.
            attention_kwargs: passed to the transformer; `{"scale": s}` scales LoRA layers.
            callback_on_step_end: called as `(pipe, step, timestep, tensors)` after each step; its result replaces
                the tensors.
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
        height, width, num_inference_steps, num_images_per_prompt = self.check_inputs(
            height,
            width,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            generator=generator,
            latents=latents,
            num_inference_steps=self.config.num_inference_steps
            if num_inference_steps is None
            else num_inference_steps,
            num_images_per_prompt=num_images_per_prompt,
        )
        self.set_guidance(guidance_scale, internal_guidance_scale)
        timesteps = self.prepare_timesteps(num_inference_steps, sigmas)
        labels, negative_labels = self.prepare_labels(class_labels, negative_class_labels, num_images_per_prompt)
        generator = self.prepare_generator(len(labels), generator)
        latents = self.prepare_latents(len(labels), height, width, generator, latents)
        latents, timesteps, known = self.prepare_start(
            latents, timesteps, image=image, mask_image=mask_image, image_latents=image_latents, strength=strength
        )
        latents = self.denoise(
            latents,
            {"class_labels": labels},
            {"class_labels": negative_labels},
            timesteps,
            known=known,
            generator=generator,
            attention_kwargs=attention_kwargs,
            callback=callback_on_step_end,
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        images = self.decode(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
