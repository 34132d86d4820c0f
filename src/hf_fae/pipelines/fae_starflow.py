"""Images of a class or of a text from a normalizing flow on any tokenizer's latents."""

import dataclasses
from collections.abc import Callable

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generators.starflow import STARFlowTransformer2DModel
from ..guidance import FlowGuidance
from .calls import separate_call
from .class_labels import ClassLabelsMixin
from .latent_pipeline import LatentPipeline, Tokenizer
from .prompts import PromptMixin


__all__ = ["FAEStarFlowPipeline"]


class FAEStarFlowPipeline(LatentPipeline, ClassLabelsMixin, PromptMixin):
    """Images of a class or a text: noise -> `transformer`, inverted block by block -> latents -> `vae` -> images.

    The flow models latents with a little noise. With `denoise` a score step removes it (see
    `STARFlowTransformer2DModel.denoise`); without, this is left to a tokenizer whose decoders were trained for it
    (`latent_noise` in the training scripts), which gives the paper's best FID.

    Args:
        vae: any tokenizer, such as `AutoencoderFAE`, or diffusers' `AutoencoderKL`. A frozen encoder is not needed.
        transformer: a flow, such as `STARFlowTransformer2DModel`.
        text_encoder, tokenizer: of a flow on text: any encoder of transformers that has a `last_hidden_state` (the
            paper: Flan-T5-XL). May be None; then calls require `prompt_embeds`, or `load_text_encoder` first.
        text_encoder_id: Hub id that `load_text_encoder` loads by default, saved with the pipeline.
        id2label: names of the classes, `{id: name}`.
        guidance_scale, denoise: defaults of calls, saved with the pipeline: the settings that go with the weights. The
            scale is 1 + w of the paper, in a form of `FlowGuidance.of`.

    Raises:
        ValueError: components of different widths, or a flow without condition.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        vae: Tokenizer,
        transformer: STARFlowTransformer2DModel,
        text_encoder: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        id2label: dict | None = None,
        guidance_scale: float | dict = 1.0,
        denoise: bool = True,
        text_encoder_id: str | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer)
        self.init_components()
        self.init_prompts(text_encoder_id)
        if transformer is not None:
            config = transformer.config
            if config.num_classes is None and config.caption_channels is None:
                raise ValueError("transformer must have num_classes or caption_channels, got a flow without condition")
        self.register_labels(id2label)
        self._guidance = FlowGuidance.of(guidance_scale)
        self.register_to_config(guidance_scale=dataclasses.asdict(self._guidance), denoise=denoise)

    @property
    def guidance(self) -> FlowGuidance:
        """The guidance of the running or latest call."""
        return self._guidance

    @property
    def guidance_scale(self) -> float:
        """1 + w."""
        return 1 + self._guidance.weight

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance.is_active

    @torch.no_grad()
    @separate_call
    def __call__(
        self,
        prompt: str | int | list[str | int] | None = None,
        class_labels: int | str | list[int | str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | dict | FlowGuidance | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_class_labels: int | str | list[int | str] | None = None,
        num_images_per_prompt: int = 1,
        denoise: bool | None = None,
        jacobi_block_size: int = 1,
        jacobi_tolerance: float = 1e-3,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[["FAEStarFlowPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: texts, for a flow on text. For one on classes the same as `class_labels`.
            class_labels: class ids, names from `id2label`, or a list of either.
            height, width: of the images in pixels; by default those of training.
            guidance_scale: 1 + w of the paper, whose images have w = 3 (classes) and 4 (text); 1 is none, or a
                `FlowGuidance`; by default the pipeline's own. Only the deep block, the first to be inverted, has it.
            negative_prompt, negative_class_labels: guide away from these (one, or one for each), instead of from the
                empty text or the null class.
            num_images_per_prompt: images for each text or label; those of one follow each other.
            denoise: remove the noise that the flow was trained with, by a score step; by default the pipeline's own.
            jacobi_block_size, jacobi_tolerance: solve for so many tokens at a time by iteration, up to that tolerance
                (the paper's code: 16 and 1e-3); 1 is token by token.
            generator: of the noise; with a list, one for each image, an image is the same in any batch.
            latents: start from these instead of noise (images, C, H, W).
            prompt_embeds, negative_prompt_embeds: instead of texts (prompts, length, caption_channels), zero at
                padding, no longer than in training.
            output_type: `"pil"`, `"np"` (B, H, W, 3) in [0, 1], `"pt"` (B, 3, H, W) in [0, 1], or `"latent"`.
            return_dict: return an `ImagePipelineOutput` instead of a tuple.
            attention_kwargs: passed to the transformer; `{"scale": s}` scales LoRA layers.
            callback_on_step_end: called as `(pipe, step, block, tensors)` after each block, the deep one first; after
                the last one, behind the score step. Tensors that it returns replace these.
            callback_on_step_end_tensor_inputs: names of these tensors; `"latents"`.

        Returns:
            `.images`.

        Raises:
            ValueError: an argument out of range or of another kind; the message names it and its value.
        """
        height, width, num_images_per_prompt, jacobi_block_size = self.check_inputs(
            height,
            width,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            generator=generator,
            latents=latents,
            num_images_per_prompt=num_images_per_prompt,
            jacobi_block_size=jacobi_block_size,
        )
        guidance = FlowGuidance.of(self.config.guidance_scale if guidance_scale is None else guidance_scale)
        self.record(_guidance=guidance)
        denoise = self.config.denoise if denoise is None else denoise
        condition, negative_condition = self.prepare_condition(
            prompt=prompt,
            class_labels=class_labels,
            negative_prompt=negative_prompt,
            negative_class_labels=negative_class_labels,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
            is_guided=guidance.is_active,
        )
        batch_size = len(next(iter(condition.values())))
        generator = self.prepare_generator(batch_size, generator)
        latents = self.prepare_latents(batch_size, height, width, generator, latents)

        blocks = list(reversed(range(len(self.transformer.blocks))))
        self.record(_num_timesteps=len(blocks))
        with self.progress_bar(total=len(blocks)) as progress_bar:
            for step, index in enumerate(blocks):
                if self.interrupt:
                    continue
                latents = self.transformer.inverse_block(
                    latents,
                    index,
                    **condition,
                    **negative_condition,
                    guidance=guidance,
                    jacobi_block_size=jacobi_block_size,
                    jacobi_tolerance=jacobi_tolerance,
                    attention_kwargs=attention_kwargs,
                )
                if index == 0 and denoise:  # before the last callback, which gets the latents to be decoded
                    latents = self.transformer.denoise(latents, **condition, attention_kwargs=attention_kwargs)
                latents = self.call_back(
                    callback_on_step_end, step, index, latents, callback_on_step_end_tensor_inputs
                )
                progress_bar.update()

        images = self.decode(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def prepare_condition(
        self,
        prompt: str | int | list[str | int] | None = None,
        class_labels: int | str | list[int | str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_class_labels: int | str | list[int | str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        is_guided: bool = True,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The transformer's condition and negative condition, as its keyword arguments; see `__call__`.

        Without guidance the negative texts are None, and not encoded.

        Raises:
            ValueError: arguments of the other kind of condition, or those of `prepare_labels` and
                `prepare_prompt_embeds`.
        """
        if self.transformer.config.num_classes is not None:
            if class_labels is None:
                prompt, class_labels = None, prompt
            texts = {"prompt": prompt, "negative_prompt": negative_prompt}
            texts |= {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
            self._refuse(texts, "a flow of classes, which requires class_labels")
            labels, negative = self.prepare_labels(class_labels, negative_class_labels, num_images_per_prompt)
            return {"class_labels": labels}, {"negative_class_labels": negative}
        labels = {"class_labels": class_labels, "negative_class_labels": negative_class_labels}
        self._refuse(labels, "a flow of captions, which requires a prompt")
        condition, negative = self.prepare_prompt_embeds(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
            is_guided=is_guided,
        )
        embeds = self._pad_embeds("prompt", condition[0])
        negative_embeds = negative and self._pad_embeds("negative_prompt", negative[0])
        return {"encoder_hidden_states": embeds}, {"negative_encoder_hidden_states": negative_embeds}

    def _pad_embeds(self, name, embeds):
        """Padded to the length of training: a flow has no mask, so the padding counts."""
        length = self.transformer.config.max_caption_length
        if embeds.shape[1] > length:
            raise ValueError(f"{name}_embeds must have at most {length} tokens, got {embeds.shape[1]}")
        return F.pad(embeds, (0, 0, 0, length - embeds.shape[1]))

    @staticmethod
    def _refuse(arguments, kind):
        given = [name for name, value in arguments.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]} must be None for {kind}, got {arguments[given[0]]!r}")
