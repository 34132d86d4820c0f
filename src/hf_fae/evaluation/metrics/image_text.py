"""Do captions and pictures find each other? Recall, models that embed both, and a map where an encoder knows no text.

The test is FAE's (arXiv 2512.07829, table 4), on COCO by SigLIP 2's text tower and its pooling head.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ...encoders import VisionEncoder
from ...images import from_uint8
from ...latents import check_finite
from ..inputs.extractors import CHUNK, padded_chunks
from ..reports.report import identify_model


__all__ = [
    "ImageTextModel",
    "LinearTextAlignment",
    "SentenceEncoder",
    "load_text_model",
    "pair_up",
    "recall_at_k",
]

_ROWS = 1024  # queries that are ranked at a time


def recall_at_k(
    similarity: torch.Tensor,
    query_groups: torch.Tensor,
    item_groups: torch.Tensor,
    k: tuple[int, ...] | list[int] = (1, 5, 10),
) -> dict[int, float]:
    """Share of the queries that have an item of their group among the first k: fractions in [0, 1].

    As COCO's protocol has it, one of a picture's five captions is enough. An item of another group that is just as
    similar ranks before.

    Args:
        similarity: (Q, D) of queries and items.
        query_groups, item_groups: (Q,) and (D,) long: what belongs together.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite values, a k below 1, or a query without an item.
    """
    if similarity.shape != (len(query_groups), len(item_groups)) or not len(query_groups):
        shape = (len(query_groups), len(item_groups))
        raise ValueError(f"similarity must be of {shape} queries and items, got {tuple(similarity.shape)}")
    if not k or min(k) < 1:
        raise ValueError(f"k must be positive numbers, got {list(k)}")
    check_finite("similarity", similarity)
    ranks = []
    for scores, groups in zip(similarity.split(_ROWS), query_groups.split(_ROWS), strict=True):
        is_own = groups[:, None] == item_groups
        if not is_own.any(1).all():
            raise ValueError(f"query_groups must be among item_groups, got {groups[~is_own.any(1)][0].item()}")
        best = scores.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
        ranks.append(((scores >= best) & ~is_own).sum(1))
    ranks = torch.cat(ranks)
    return {count: (ranks < count).double().mean().item() for count in k}


def pair_up(
    pictures: torch.Tensor, captions: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Every picture and every caption once, and what belongs together: COCO's rows repeat a picture five times.

    What is joined by a row, directly or through others, is one group: of equal captions, each finds all pictures.

    Args:
        pictures, captions: (N,) long, equal where these are equal.

    Returns:
        For the pictures and for the captions, the rows where each is met first, and their groups.
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    found = [np.unique(ids.numpy(), return_index=True, return_inverse=True)[1:] for ids in (pictures, captions)]
    (picture_rows, picture_ids), (caption_rows, caption_ids) = found
    count = len(picture_rows) + len(caption_rows)
    edges = (np.ones(len(pictures)), (picture_ids, caption_ids + len(picture_rows)))
    groups = torch.from_numpy(connected_components(coo_array(edges, shape=(count, count)), directed=False)[1]).long()
    picture_groups, caption_groups = groups.split([len(picture_rows), len(caption_rows)])
    return (torch.from_numpy(picture_rows), picture_groups), (torch.from_numpy(caption_rows), caption_groups)


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


class LinearTextAlignment:
    """Ridge regression from a picture's tokens, in their mean, to the embedding of its caption; in fp64 on the CPU.

    For encoders that have no text tower. Inputs are standardised per dimension; the penalty is the one of a grid with
    the least generalised cross-validation error (Golub, Heath and Wahba 1979), unless it is given. Pictures and
    captions are compared by how they differ from the mean caption: the regression draws to it, and captions near it
    would be the nearest ones of every picture.

    Args:
        features: (N, C), of the train split.
        text_embeds: (N, D), of the captions.
        penalty: times N.

    Attributes:
        penalty: that was chosen.

    Raises:
        ValueError: fewer than 2 pictures, shapes that do not fit, NaN or infinite values.
    """

    PENALTIES = tuple(10 ** (exponent / 4) for exponent in range(-16, 13))

    def __init__(self, features: torch.Tensor, text_embeds: torch.Tensor, penalty: float | None = None):
        if features.ndim != 2 or text_embeds.ndim != 2 or not 2 <= len(features) == len(text_embeds):
            shapes = f"{tuple(features.shape)} and {tuple(text_embeds.shape)}"
            raise ValueError(f"features and text_embeds must have shapes (N, C) and (N, D) with N > 1, got {shapes}")
        check_finite("features", features)
        check_finite("text_embeds", text_embeds)
        inputs, targets = features.double().cpu(), text_embeds.double().cpu()
        self.mean, self.text_mean = inputs.mean(0), targets.mean(0)
        self.std = inputs.std(0, correction=0).clamp_min(1e-6)
        inputs, targets = (inputs - self.mean) / self.std, targets - self.text_mean
        count = len(inputs)
        variances, directions = torch.linalg.eigh(inputs.T @ inputs / count)
        variances = variances.clamp_min(0)
        projected = directions.T @ (inputs.T @ targets) / count

        def validation_error(penalty):
            shrunk = 1 / (variances + penalty)
            explained = projected.square().sum(1) * (2 * shrunk - variances * shrunk.square())
            freedom = 1 + (variances * shrunk).sum()
            return (targets.square().sum() / count - explained.sum()) / (1 - freedom / count) ** 2

        self.penalty = min(self.PENALTIES, key=validation_error) if penalty is None else penalty
        self.weight = directions @ (projected / (variances + self.penalty)[:, None])

    def image_embeds(self, features: torch.Tensor) -> torch.Tensor:
        """(M, D) fp32, of unit length, of features (M, C)."""
        return F.normalize((features.double().cpu() - self.mean) / self.std @ self.weight, dim=-1).float()

    def text_embeds(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """(M, D) fp32, of unit length, of the text encoder's embeddings (M, D)."""
        return F.normalize(text_embeds.double().cpu() - self.text_mean, dim=-1).float()
