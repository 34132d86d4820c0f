"""Models that embed captions: CLIP and SigLIP, which embed images as well, and sentence encoders."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ...encoders import VisionEncoder
from ...images import from_uint8
from ..options import CHUNK
from ..provenance import identify_model
from .extractors import padded_chunks


__all__ = ["ImageTextModel", "SentenceEncoder", "load_text_model"]


class ImageTextModel(nn.Module):
    """transformers' CLIP, SigLIP or SigLIP 2 in fp32: unit-length embeddings of images and texts.

    The model gets `CHUNK` images or texts at a time, so that embeddings do not depend on their number.

    Attributes:
        name: part of the metrics' names.
        settings: for the report, JSON-able.
        encoder: the vision tower.
    """

    def __init__(self, model, tokenizer, encoder: VisionEncoder, name: str):
        super().__init__()
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self.encoder, self.name = encoder, name
        self.model.vision_model = None  # the encoder has it
        height, width = encoder.image_size
        resize = f"bicubic without antialias, to {height} x {width}"
        self.settings = {"class": type(model).__name__, "resize": resize}

    @classmethod
    def from_pretrained(cls, path: str) -> "ImageTextModel":
        """Load from a Hub id or a folder.

        Raises:
            ValueError: another kind of model, or a checkpoint with missing weights.
            OSError: missing files.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        kind = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
        if kind not in _IMAGE_TEXT_MODELS:
            raise ValueError(f"model_type must be one of {', '.join(_IMAGE_TEXT_MODELS)}, got {kind!r}")
        encoder = VisionEncoder.from_pretrained(path, dtype=torch.float32)
        model, info = AutoModel.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        _check_weights(path, info["missing_keys"])
        found = cls(
            model, AutoTokenizer.from_pretrained(path, trust_remote_code=False), encoder, Path(path).name.lower()
        )
        found.settings |= identify_model(path)
        return found

    @torch.no_grad()
    def image_embeds(self, images: torch.Tensor) -> torch.Tensor:
        """(B, D) fp32, of 8-bit images (B, 3, H, W) on any device, resized to the model's input size."""
        embeds = []
        for chunk, count in padded_chunks(images):
            pooled = self.encoder(from_uint8(chunk.to(self.encoder.device))).pooler_output[:count]
            if hasattr(self.model, "visual_projection"):  # CLIP's
                pooled = self.model.visual_projection(pooled)
            embeds.append(F.normalize(pooled, dim=-1))
        return torch.cat(embeds)

    @torch.no_grad()
    def text_embeds(self, texts: list[str]) -> torch.Tensor:
        """(B, D) fp32; texts are padded and truncated to the model's length (SigLIP: 64 tokens, CLIP: 77)."""
        length = self.model.config.text_config.max_position_embeddings
        embeds = []
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            padded = chunk + [""] * (CHUNK - len(chunk))
            options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
            options["padding_side"] = "right"  # as in training: SigLIP pools the last position
            if self.model.config.model_type.startswith("siglip"):
                # Trained on lower-case texts, without a padding mask.
                ids = self.tokenizer([text.lower() for text in padded], **options)["input_ids"]
                inputs = {"input_ids": ids.to(self.encoder.device)}
            else:
                inputs = self.tokenizer(padded, **options).to(self.encoder.device)
            pooled = self.model.get_text_features(**inputs).pooler_output
            embeds.append(F.normalize(pooled[: len(chunk)], dim=-1))
        return torch.cat(embeds)

    @torch.no_grad()
    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, D) fp32, of patch tokens (B, N, C) after the final norm, by SigLIP's attention pooling.

        Raises:
            ValueError: a model without attention pooling, or tokens of another width.
        """
        if not hasattr(self.encoder.model, "head"):
            raise ValueError(
                f"{self.name!r} must pool its patch tokens as SigLIP does: a {type(self.model).__name__} has a "
                "class token for the image, which cannot be computed from patch tokens"
            )
        if tokens.shape[-1] != self.encoder.hidden_size:
            raise ValueError(f"tokens must have width {self.encoder.hidden_size}, got {tuple(tokens.shape)}")
        return F.normalize(self.encoder.model.head(tokens.to(self.encoder.device).float()), dim=-1)


_IMAGE_TEXT_MODELS = ("clip", "siglip", "siglip2")


class SentenceEncoder(nn.Module):
    """A text encoder of transformers (all-MiniLM and others) in fp32: the mean token, of unit length.

    Attributes:
        name, settings: as in `ImageTextModel`.
    """

    def __init__(self, model, tokenizer, name: str):
        super().__init__()
        self.model, self.tokenizer, self.name = model.requires_grad_(False).eval(), tokenizer, name
        self.settings = {"class": type(model).__name__, "pooling": "mean"}

    @classmethod
    def from_pretrained(cls, path: str) -> "SentenceEncoder":
        """Load from a Hub id or a folder.

        Raises:
            ValueError: a checkpoint with missing weights.
            OSError: missing files.
        """
        from transformers import AutoModel, AutoTokenizer

        model, info = AutoModel.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        _check_weights(path, [name for name in info["missing_keys"] if not name.startswith("pooler.")])
        found = cls(model, AutoTokenizer.from_pretrained(path, trust_remote_code=False), Path(path).name.lower())
        found.settings |= identify_model(path)
        return found

    @torch.no_grad()
    def text_embeds(self, texts: list[str]) -> torch.Tensor:
        """(B, D) fp32, in chunks as in `ImageTextModel`."""
        length = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        embeds = []
        for start in range(0, len(texts), CHUNK):
            options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
            inputs = self.tokenizer(texts[start : start + CHUNK], **options).to(self.model.device)
            states, mask = self.model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            embeds.append(F.normalize((states * mask).sum(1) / mask.sum(1).clamp_min(1), dim=-1))
        return torch.cat(embeds)


def _check_weights(path, missing):
    """transformers only warns about missing weights, and leaves them random."""
    if missing:
        raise ValueError(f"{str(path)!r} lacks {len(missing)} weights of its model, such as {min(missing)}")


def load_text_model(path: str) -> ImageTextModel | SentenceEncoder:
    """A model of images and texts, or a text encoder alone, from a Hub id or a folder.

    Raises:
        ValueError, OSError: it cannot be loaded.
    """
    from transformers import AutoConfig

    model_type = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
    kind = ImageTextModel if model_type in _IMAGE_TEXT_MODELS else SentenceEncoder
    return kind.from_pretrained(path)
