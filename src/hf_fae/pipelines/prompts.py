"""Prompts as texts or as embeddings, in all text-conditional pipelines."""

import torch
from transformers import PreTrainedModel

from ..latents import check_finite
from ..text import encode_text, load_text_encoder


__all__ = ["PromptMixin"]


class PromptMixin:
    """For a pipeline with `text_encoder`, `tokenizer` and a `transformer` that has `config.caption_channels`.

    Both may be absent, as they are often the largest part of a checkpoint: `load_text_encoder` then fetches
    `config.text_encoder_id`. Nevertheless they are arguments of `__init__` without a default: only such ones can be
    replaced or left out in `DiffusionPipeline.from_pretrained`.
    """

    def init_prompts(self, text_encoder_id: str | None) -> None:
        """Called by `__init__` once the components are registered.

        Raises:
            ValueError: text encoder and transformer have different widths.
        """
        self.register_to_config(text_encoder_id=text_encoder_id)
        if self.text_encoder is not None and self.transformer is not None:
            self._check_text_encoder(self.text_encoder)

    def load_text_encoder(self, pretrained_model_name_or_path: str | None = None) -> None:
        """Attach the text encoder and its tokenizer, in dtype and on the device of the transformer.

        Args:
            pretrained_model_name_or_path: Hub id or folder; by default `config.text_encoder_id`.

        Raises:
            ValueError: none is named here or in the config, or its width is not that of the transformer's captions.
        """
        path = pretrained_model_name_or_path or self.config.text_encoder_id
        if path is None:
            raise ValueError("config.text_encoder_id is None: pass a Hub id or folder to load_text_encoder")
        tokenizer, text_encoder = load_text_encoder(path, self.transformer.dtype)
        self._check_text_encoder(text_encoder)
        self.register_modules(text_encoder=text_encoder.to(self.transformer.device), tokenizer=tokenizer)

    def _check_text_encoder(self, text_encoder: PreTrainedModel):
        width = text_encoder.config.hidden_size
        if self.transformer.config.caption_channels != width:
            raise ValueError(
                f"transformer must have caption_channels {width}, as the text_encoder has hidden_size, "
                f"got {self.transformer.config.caption_channels}"
            )

    def encode_prompt(
        self, prompt: str | list[str], name: str = "prompt", max_length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (prompts, max_length, caption_channels) of texts, zero after their ends, and their mask.

        See `hf_fae.text.encode_text`. Neither the transformer nor the tokenizer of images is needed: texts can be
        embedded first, and their encoder freed.

        Args:
            name: of the argument in errors.
            max_length: tokens of a text; by default `config.max_caption_length` of the transformer.

        Raises:
            ValueError: no text or list of texts, no text encoder, or no positive `max_length`.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"{name} must be a text or a list of texts, got {prompt!r}")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                f"{name} cannot be read without text_encoder and tokenizer: call load_text_encoder() to fetch "
                f"{self.config.text_encoder_id!r}, or load_text_encoder(PATH_OR_ID), or pass {name}_embeds"
            )
        if max_length is None and self.transformer is not None:
            max_length = self.transformer.config.max_caption_length
        if max_length is None or max_length < 1:
            raise ValueError(f"max_length must be at least 1, and given without a transformer, got {max_length}")
        return encode_text(self.tokenizer, self.text_encoder, list(prompts), max_length, self._execution_device)

    def prepare_prompt_embeds(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        is_guided: bool = True,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
        """Embeddings (images, length, caption_channels) and their mask (images, length), of what to generate and of
        what to guide away from.

        The latter is the empty text by default, and None without guidance. Without a mask,
        embeddings are text where they are not zero.

        Raises:
            ValueError: neither or both of a text and its embeddings, embeddings or a mask that are no tensors, of
                another shape or not finite, or a number of negative ones that is neither one nor one per prompt.
        """
        if (prompt is None) == (prompt_embeds is None):
            both = "neither" if prompt is None else "both"
            raise ValueError(f"either prompt or prompt_embeds must be given, got {both}")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("negative_prompt or negative_prompt_embeds may be given, got both")
        condition = self._condition("prompt", prompt, prompt_embeds, prompt_attention_mask)
        count = len(condition[0])
        condition = tuple(part.repeat_interleave(num_images_per_prompt, dim=0) for part in condition)
        if not is_guided:
            return condition, None
        negative_prompt = "" if negative_prompt is None else negative_prompt
        negative = self._condition(
            "negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
        )
        if len(negative[0]) not in (1, count):
            raise ValueError(f"negative_prompt must be one or {count} as there are prompts, got {len(negative[0])}")
        negative = (part.expand(count, *part.shape[1:]) for part in negative)
        return condition, tuple(part.repeat_interleave(num_images_per_prompt, dim=0) for part in negative)

    def _condition(self, name, prompt, embeds, mask):
        if embeds is None:
            if mask is not None:
                raise ValueError(
                    f"{name}_attention_mask must be None without {name}_embeds, got {type(mask).__name__}"
                )
            return self.encode_prompt(prompt, name)
        for argument, value in ((f"{name}_embeds", embeds), (f"{name}_attention_mask", mask)):
            if not isinstance(value, torch.Tensor | None):
                raise ValueError(f"{argument} must be a tensor, got a {type(value).__name__}")
        width = self.transformer.config.caption_channels
        if embeds.ndim != 3 or embeds.shape[2] != width or 0 in embeds.shape:
            raise ValueError(f"{name}_embeds must have shape (prompts, length, {width}), got {tuple(embeds.shape)}")
        check_finite(f"{name}_embeds", embeds)
        mask = embeds.any(dim=-1) if mask is None else mask
        if mask.shape != embeds.shape[:2]:
            raise ValueError(
                f"{name}_attention_mask must have shape {tuple(embeds.shape[:2])} as {name}_embeds, "
                f"got {tuple(mask.shape)}"
            )
        return embeds.to(self._execution_device), mask.to(self._execution_device, torch.bool)
