"""Caption embeddings of a frozen text encoder, computed in each step or kept in a latent cache."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..loading import loading
from ..text import encode_text, load_text_encoder
from .fingerprints import fingerprint_parameters


__all__ = ["CAPTION_LENGTH", "CaptionEncoder", "load_caption_encoder", "pack_embeds", "unpack_embeds"]

CAPTION_LENGTH = 128  # tokens, of FAE's and STARFlow's models


class CaptionEncoder(nn.Module):
    """A frozen text encoder and the number of tokens that it embeds per text.

    Args:
        tokenizer, text_encoder: as in `hf_fae.text.encode_text`.
        max_length: tokens that texts are padded and truncated to.
        source: Hub id or folder that they were loaded from, for the record.

    Raises:
        ValueError: `max_length` is not positive.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        max_length: int,
        source: str | None = None,
    ):
        super().__init__()
        if max_length < 1:
            raise ValueError(f"max_caption_length must be at least 1, got {max_length}")
        self.tokenizer, self.max_length, self.source = tokenizer, max_length, source
        self.text_encoder = text_encoder.eval().requires_grad_(False)

    @property
    def width(self) -> int:
        """Channels of the embeddings."""
        return self.text_encoder.config.hidden_size

    @property
    def hub_id(self) -> str | None:
        """Hub id of the text encoder; None if it was loaded from a folder."""
        return None if self.source is None or Path(self.source).is_dir() else self.source

    def forward(self, texts: list[str]) -> torch.Tensor:
        """Embeddings (texts, max_length, width) in fp32, zero after the end of each text."""
        return encode_text(self.tokenizer, self.text_encoder, texts, self.max_length, warns=False)[0].float()

    def fingerprint(self) -> str:
        """Hash of what embeddings depend on, except for `max_length`: weights and vocabulary.

        Poolers do not count: nothing reads them, and their weights are often random.
        """
        weights = [p for name, p in self.text_encoder.named_parameters() if "pooler" not in name]
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return fingerprint_parameters(weights, hashlib.sha256(vocabulary.encode()).hexdigest())


def load_caption_encoder(path: str, max_length: int = CAPTION_LENGTH) -> CaptionEncoder:
    """The text encoder in a Hub repository or a folder, in fp32.

    Raises:
        ValueError: it cannot be loaded, or as `CaptionEncoder`.
    """
    with loading("text_encoder", path):
        tokenizer, text_encoder = load_text_encoder(path)
    return CaptionEncoder(tokenizer, text_encoder, max_length, path)


def pack_embeds(embeds: torch.Tensor) -> list[bytes]:
    """Each text's embeddings in float16 without the padding, of a batch (B, length, width)."""
    ends = embeds.any(dim=-1).sum(1).tolist()
    return [row[:end].tobytes() for row, end in zip(embeds.half().cpu().numpy(), ends, strict=True)]


def unpack_embeds(cells: Sequence, width: int) -> torch.Tensor:
    """The inverse of `pack_embeds`, in fp32 and padded to the longest of these texts; `cells` are buffers of bytes."""
    rows = [torch.from_numpy(np.frombuffer(cell, np.float16).reshape(-1, width).astype(np.float32)) for cell in cells]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
