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
    """transformers' CLIP, SigLIP or SigLIP 2 in fp32: embeddings of pictures and of texts, of unit length.

    It shows pictures and texts to the model `CHUNK` at a time, so that these do not depend on how many there are.

    Attributes:
        name: stands in the name of a metric.
        settings: what a report tells of it, JSON-able.
        encoder: its vision tower.
    """

    def __init__(self, model, tokenizer, encoder: VisionEncoder, name: str):
        super().__init__()
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self.encoder, self.name = encoder, name
        self.model.vision_model = None  # it is the encoder's
        height, width = encoder.image_size
        resize = f"bicubic without antialias, to {height} x {width}"
        self.settings = {"class": type(model).__name__, "resize": resize}

    @classmethod
    def from_pretrained(cls, path: str) -> "ImageTextModel":
        """Of a Hub id or a folder.

        Raises:
            ValueError: a model of another kind, or weights that the checkpoint lacks.
            OSError: files that are not there.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        kind = AutoConfig.from_pretrained(path).model_type
        if kind not in _IMAGE_TEXT_MODELS:
            raise ValueError(f"model_type must be one of {', '.join(_IMAGE_TEXT_MODELS)}, got {kind!r}")
        encoder = VisionEncoder.from_pretrained(path, dtype=torch.float32)
        model, info = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        _check_weights(path, info["missing_keys"])
        found = cls(model, AutoTokenizer.from_pretrained(path), encoder, Path(path).name.lower())
        found.settings |= identify_model(path)
        return found

    @torch.no_grad()
    def image_embeds(self, images: torch.Tensor) -> torch.Tensor:
        """(B, D) fp32 of 8-bit pictures (B, 3, H, W) anywhere, resized to the model's own size."""
        embeds = []
        for chunk, count in padded_chunks(images):
            pooled = self.encoder(from_uint8(chunk.to(self.encoder.device))).pooler_output[:count]
            if hasattr(self.model, "visual_projection"):  # CLIP's
                pooled = self.model.visual_projection(pooled)
            embeds.append(F.normalize(pooled, dim=-1))
        return torch.cat(embeds)

    @torch.no_grad()
    def text_embeds(self, texts: list[str]) -> torch.Tensor:
        """(B, D) fp32; texts are padded and cut to the length that the model has (SigLIP: 64 tokens, CLIP: 77)."""
        length = self.model.config.text_config.max_position_embeddings
        embeds = []
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            padded = chunk + [""] * (CHUNK - len(chunk))
            options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
            options["padding_side"] = "right"  # as in training: SigLIP pools the last place, whatever is there
            if self.model.config.model_type.startswith("siglip"):
                # Trained on lower-case texts, without a mask of the padding.
                ids = self.tokenizer([text.lower() for text in padded], **options)["input_ids"]
                inputs = {"input_ids": ids.to(self.encoder.device)}
            else:
                inputs = self.tokenizer(padded, **options).to(self.encoder.device)
            pooled = self.model.get_text_features(**inputs).pooler_output
            embeds.append(F.normalize(pooled[: len(chunk)], dim=-1))
        return torch.cat(embeds)

    @torch.no_grad()
    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, D) fp32 of patch tokens (B, N, C) after the final norm, by the attention that SigLIP pools them with.

        Raises:
            ValueError: a model that has nothing of the kind, or tokens of another width.
        """
        if not hasattr(self.encoder.model, "head"):
            raise ValueError(
                f"{self.name!r} must pool its patch tokens, as SigLIP does it: a {type(self.model).__name__} has a "
                "class token for the picture, which no patch token can give"
            )
        if tokens.shape[-1] != self.encoder.hidden_size:
            raise ValueError(f"tokens must have width {self.encoder.hidden_size}, got {tuple(tokens.shape)}")
        return F.normalize(self.encoder.model.head(tokens.to(self.encoder.device).float()), dim=-1)


_IMAGE_TEXT_MODELS = ("clip", "siglip", "siglip2")


class SentenceEncoder(nn.Module):
    """A text encoder of transformers (all-MiniLM and others) in fp32: the mean of its tokens, of unit length.

    Attributes:
        name, settings: as of `ImageTextModel`.
    """

    def __init__(self, model, tokenizer, name: str):
        super().__init__()
        self.model, self.tokenizer, self.name = model.requires_grad_(False).eval(), tokenizer, name
        self.settings = {"class": type(model).__name__, "pooling": "mean"}

    @classmethod
    def from_pretrained(cls, path: str) -> "SentenceEncoder":
        """Of a Hub id or a folder.

        Raises:
            ValueError: weights that the checkpoint lacks.
            OSError: files that are not there.
        """
        from transformers import AutoModel, AutoTokenizer

        model, info = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        _check_weights(path, [name for name in info["missing_keys"] if not name.startswith("pooler.")])
        found = cls(model, AutoTokenizer.from_pretrained(path), Path(path).name.lower())
        found.settings |= identify_model(path)
        return found

    @torch.no_grad()
    def text_embeds(self, texts: list[str]) -> torch.Tensor:
        """(B, D) fp32, in chunks as of `ImageTextModel`."""
        length = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        embeds = []
        for start in range(0, len(texts), CHUNK):
            options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
            inputs = self.tokenizer(texts[start : start + CHUNK], **options).to(self.model.device)
            states, mask = self.model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            embeds.append(F.normalize((states * mask).sum(1) / mask.sum(1).clamp_min(1), dim=-1))
        return torch.cat(embeds)


def _check_weights(path, missing):
    """transformers only warns of weights that a checkpoint lacks, and leaves them random."""
    if missing:
        raise ValueError(f"{str(path)!r} lacks {len(missing)} weights of its model, such as {min(missing)}")


def load_text_model(path: str) -> ImageTextModel | SentenceEncoder:
    """What knows texts: a model of images and texts, or a text encoder alone; of a Hub id or a folder.

    Raises:
        ValueError, OSError: it cannot be loaded.
    """
    from transformers import AutoConfig

    kind = ImageTextModel if AutoConfig.from_pretrained(path).model_type in _IMAGE_TEXT_MODELS else SentenceEncoder
    return kind.from_pretrained(path)
