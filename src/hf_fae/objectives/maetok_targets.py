"""The targets of MAETok's auxiliary decoders (arXiv 2502.03444): HOG, tokens of frozen encoders, and captions."""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..autoencoders.maetok import CAPTION
from ..encoders import VisionEncoder
from ..losses.hog import BINS, CELL, hog_features
from ..losses.perceptual import parse_term
from ..utils.hub_errors import hub_errors


__all__ = ["CaptionTarget", "FeatureTarget", "HOGTarget", "load_targets", "masked_mean", "target_names"]

HOG = "hog"
IGNORED = -100  # of F.cross_entropy: positions after the end of a caption


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of values (B, N) where `mask` (B, N) is True; 0 if nowhere. Without a mask, of all values."""
    return values.mean() if mask is None else (values * mask).sum() / mask.sum().clamp_min(1)


class HOGTarget(nn.Module):
    """Histograms of oriented gradients of each patch, by the mean squared error.

    Args:
        patch_size: pixels along each side, a multiple of 8.
    """

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.width = 3 * BINS * (patch_size // CELL) ** 2

    def forward(
        self, prediction: torch.Tensor, batch: dict, grid: tuple[int, int], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss, a scalar in fp32, of predictions (B, N, width) for "pixel_values", over the patches in `mask`."""
        target = hog_features(batch["pixel_values"], self.patch_size)
        return masked_mean((prediction.float() - target).square().mean(-1), mask)


class FeatureTarget(nn.Module):
    """The last layer's patch tokens of a frozen encoder, which sees the whole images.

    They are resized so that the encoder has as many tokens as there are patches.

    Args:
        encoder: any frozen encoder.
        loss: `"cosine"`, 1 - cosine (the released code), or `"l2"`, the mean squared error (the paper's eq. 8).

    Raises:
        ValueError: another `loss`.
    """

    def __init__(self, encoder: VisionEncoder, loss: Literal["cosine", "l2"] = "cosine"):
        if loss not in ("cosine", "l2"):
            raise ValueError(f"loss must be 'cosine' or 'l2', got {loss!r}")
        super().__init__()
        self.encoder, self.loss = encoder.requires_grad_(False), loss
        self.width = encoder.hidden_size

    def forward(
        self, prediction: torch.Tensor, batch: dict, grid: tuple[int, int], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As `HOGTarget.forward`."""
        target = self.encoder(batch["pixel_values"], grid=grid).last_hidden_state.float()
        prediction = prediction.float()
        if self.loss == "cosine":
            return masked_mean(1 - F.cosine_similarity(prediction, target, dim=-1), mask)
        return masked_mean((prediction - target).square().mean(-1), mask)


class CaptionTarget(nn.Module):
    """The ids of the first tokens of an image's caption, by the cross-entropy; they have no patches, hence no mask.

    Args:
        tokenizer: any tokenizer of transformers.
        length: number of tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int):
        super().__init__()
        self.tokenizer, self.length, self.width = tokenizer, length, len(tokenizer)

    def forward(
        self, prediction: torch.Tensor, batch: dict, grid: tuple[int, int], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss, a scalar in fp32, of logits (B, length, width) for "captions"; 0 if all of them are empty."""
        ids = self.token_ids(batch["captions"]).to(prediction.device)
        total = F.cross_entropy(prediction.float().flatten(0, 1), ids.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (ids != IGNORED).sum().clamp_min(1)

    @torch.compiler.disable
    def token_ids(self, captions: list[str]) -> torch.Tensor:
        """(B, length) long, `IGNORED` after the end of a caption."""
        rows = self.tokenizer(captions, truncation=True, max_length=self.length)["input_ids"]
        return torch.tensor([row + [IGNORED] * (self.length - len(row)) for row in rows])


def target_names(terms: list[str], patch_size: int) -> list[str]:
    """The names of targets, without loading anything; arguments as in `load_targets`.

    Raises:
        ValueError: a term of another form, a repeated name or one that a module cannot have, or a patch size that HOG
            does not support.
    """
    names = []
    for term in terms:
        name, source, _ = parse_term(term) or (None, None, None)
        if name is None or not _is_module_name(name) or (source is None) != (name == HOG):
            raise ValueError(
                f"auxiliary_targets must be {HOG}=WEIGHT, {CAPTION}:TOKENIZER=WEIGHT or NAME:ENCODER=WEIGHT with "
                f"positive weights, got {term!r}"
            )
        if name in names:
            raise ValueError(f"auxiliary_targets must have each name once, got {name!r} twice")
        names.append(name)
    if HOG in names and patch_size % CELL:
        raise ValueError(f"patch_size must be a multiple of {CELL} for the target {HOG}, got {patch_size}")
    return names


def load_targets(
    terms: list[str], patch_size: int, feature_loss: Literal["cosine", "l2"], caption_length: int
) -> tuple[nn.ModuleDict, dict[str, float]]:
    """Targets by name, each a module with a `width`, and the weights of their losses.

    Args:
        terms: `"hog=1.0"`, `"caption:TOKENIZER=1.0"`, and any name with an encoder, such as
            `"dinov2:facebook/dinov2-large=1.0"`; encoders and tokenizers are Hub ids or folders.
        patch_size: of the tokenizer.
        feature_loss: of encoders, see `FeatureTarget`.
        caption_length: tokens per caption.

    Raises:
        ValueError: as `target_names` and `VisionEncoder.from_pretrained`.
        OSError: a model is not found.
    """
    target_names(terms, patch_size)
    targets, weights = nn.ModuleDict(), {}
    for term in terms:
        name, source, weights[name] = parse_term(term)
        if name == HOG:
            targets[name] = HOGTarget(patch_size)
        elif name == CAPTION:
            with hub_errors(source):
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            targets[name] = CaptionTarget(tokenizer, caption_length)
        else:
            targets[name] = FeatureTarget(VisionEncoder.from_pretrained(source, dtype=torch.float32), feature_loss)
    return targets, weights


def _is_module_name(name):
    """Whether a module of a `ModuleDict` can have this name."""
    return name.isidentifier() and not hasattr(nn.ModuleDict(), name)
