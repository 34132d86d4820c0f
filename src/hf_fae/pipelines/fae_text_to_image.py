"""Text-conditional images from a denoiser on any tokenizer's latents."""

from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generators.mmdit import MMDiTTransformer2DModel
from ..generators.raev2 import RAEv2Transformer2DModel
from ..guidance import Guidance
from ..schedulers.euler_maruyama import FlowMatchEulerMaruyamaScheduler
from .calls import separate_call
from .denoising import DenoisingPipeline
from .image_inputs import ImageInput
from .latent_pipeline import Tokenizer
from .prompts import PromptMixin


__all__ = ["FAETextToImagePipeline"]

Denoiser = MMDiTTransformer2DModel | RAEv2Transformer2DModel


class FAETextToImagePipeline(DenoisingPipeline, PromptMixin):
    """Text-conditional images: noise -> `transformer` under `scheduler` -> latents -> `vae` -> images.

    Args:
        vae: any tokenizer, such as `AutoencoderFAE`, or diffusers' `AutoencoderKL`. A frozen encoder is not needed.
        transformer: a denoiser that reads texts, `MMDiTTransformer2DModel` or `RAEv2Transformer2DModel`.
        scheduler: `FlowMatchEulerDiscreteScheduler` (ODE) or `FlowMatchEulerMaruyamaScheduler` (SDE), with the shift
            that the denoiser was trained with.
        text_encoder, tokenizer: any encoder of transformers with a `last_hidden_state` (the paper: Flan-T5-XL). May be
            None; then calls require `prompt_embeds` or a preceding `load_text_encoder`.
        text_encoder_id: Hub id or folder that `load_text_encoder` uses by default, saved with the pipeline.
        guidance_scale, num_inference_steps: defaults of calls, saved with the pipeline: the settings that belong to
            the weights. Forms as in `Guidance.of`; FAE samples with `[(0.0, 0.9, 1.5)]` (appendix D).
        guidance_transformer: a weaker denoiser of the same latents and texts, as in `FAEDiTPipeline`.
        internal_guidance_scale: as in `FAEDiTPipeline`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->guidance_transformer->vae"
    _optional_components = ["text_encoder", "tokenizer", "guidance_transformer"]

    def __init__(
        self,
        vae: Tokenizer,
        transformer: Denoiser,
        scheduler: FlowMatchEulerDiscreteScheduler | FlowMatchEulerMaruyamaScheduler,
        text_encoder: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        guidance_scale: float | list | dict = 1.0,
        num_inference_steps: int = 250,
        guidance_transformer: Denoiser | None = None,
        text_encoder_id: str | None = None,
        internal_guidance_scale: float | list | dict = 1.0,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            guidance_transformer=guidance_transformer,
        )
        self.init_denoising(guidance_scale, num_inference_steps, internal_guidance_scale)
        if transformer is not None and transformer.config.get("caption_channels") is None:
            raise ValueError(
                f"transformer must have caption_channels, got a {type(transformer).__name__} without text"
            )
        self.init_prompts(text_encoder_id)

    @torch.no_grad()
    @separate_call
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | list | dict | Guidance | None = None,
        internal_guidance_scale: float | list | dict | Guidance | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        image_latents: torch.Tensor | None = None,
        strength: float | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[["FAETextToImagePipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: a text or a list of texts. Long texts are truncated, with a warning.
            height, width: of the images in pixels; by default those of training.
            num_inference_steps: model evaluations; by default the pipeline's own.
            guidance_scale: one scale, `[(t_low, t_high, scale), ...]` over noise times, or a `Guidance`; by default
                the pipeline's own. Where the scale is 1 the conditional pass is the only one.
            internal_guidance_scale: the same for guidance by the transformer's base head, which needs no further pass;
                with both, each branch is guided by it first.
            negative_prompt: guide away from these texts (one, or one for each prompt), instead of from the empty one.
            num_images_per_prompt: images per prompt; those of a prompt are consecutive.
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
            prompt_embeds, negative_prompt_embeds: instead of texts (prompts, length, caption_channels), of any length.
            prompt_attention_mask, negative_prompt_attention_mask: where they are text, (prompts, length); by default
                where they are not zero.
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
        away = negative_prompt if negative_prompt_embeds is None else "negative_prompt_embeds"
        if self.guidance_transformer is not None and away is not None:
            raise ValueError(
                f"negative_prompt must be None with a guidance_transformer, which reads the same texts, got {away!r}"
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
        condition, negative_condition = _of_one_length(
            *self.prepare_prompt_embeds(
                prompt,
                negative_prompt,
                prompt_embeds,
                negative_prompt_embeds,
                prompt_attention_mask=prompt_attention_mask,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
                num_images_per_prompt=num_images_per_prompt,
                is_guided=self.do_classifier_free_guidance and self.guidance_transformer is None,
            )
        )
        generator = self.prepare_generator(len(condition[0]), generator)
        latents = self.prepare_latents(len(condition[0]), height, width, generator, latents)
        latents, timesteps, known = self.prepare_start(
            latents, timesteps, image=image, mask_image=mask_image, image_latents=image_latents, strength=strength
        )
        latents = self.denoise(
            latents,
            _arguments(condition),
            negative_condition and _arguments(negative_condition),
            timesteps,
            known=known,
            generator=generator,
            attention_kwargs=attention_kwargs,
            callback=callback_on_step_end,
            callback_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        images = self.decode(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _arguments(condition):
    return dict(zip(("encoder_hidden_states", "encoder_attention_mask"), condition, strict=True))


def _of_one_length(condition, negative_condition):
    """Embeddings and masks of both, as long as their longest text: masked padding only costs compute."""
    parts = [part for part in (condition, negative_condition) if part is not None]
    ends = [(mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max().item() for _, mask in parts]
    length = max(1, *ends)
    parts = [
        (F.pad(embeds, (0, 0, 0, length - embeds.shape[1])), F.pad(mask, (0, length - mask.shape[1])))
        for embeds, mask in parts
    ]
    return parts[0], parts[1] if negative_condition is not None else None
