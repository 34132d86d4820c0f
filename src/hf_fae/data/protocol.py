"""What a training asks of its data."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch

from .captions import CaptionEncoder


__all__ = ["DataWrapper", "GeneratorData", "TrainingData"]


@runtime_checkable
class TrainingData(Protocol):
    """What the training loop and the scripts ask of data: batches by number, and facts for the log and the card.

    A batch is a dict of tensors and lists. "row_ids" (B,) long says which rows it holds; the list "corrupt" holds the
    (row id, kind) of rows that had to be replaced.
    """

    def __len__(self) -> int:
        """Number of training rows; TypeError for streamed data, where it is unknown."""
        ...

    def batches(
        self, batch_size: int, *, images_seen: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> Iterator[dict]:
        """Endless training batches of one process.

        Args:
            batch_size: images of this process per batch.
            images_seen: images that all processes together have consumed so far: where to continue.
            rank, world_size: this process, and the number of processes that share the data.
            num_workers: processes that load rows, per rank; 0 loads them here.
        """
        ...

    def signature(self, batch_size: int, world_size: int = 1, num_workers: int = 0) -> dict:
        """Plain values that the row order depends on; a resumed run compares them with those of its checkpoint."""
        ...

    def validation_batches(self, batch_size: int) -> Iterator[dict]:
        """The validation rows in a fixed order, unmirrored; the last batch may be smaller."""
        ...

    def describe(self) -> str:
        """Rows, classes and splits in one line, for the start of a run."""
        ...

    def facts(self) -> dict:
        """Facts for the model card: "dataset", "split", "validation_split", "resolution", "validation_samples"."""
        ...


@runtime_checkable
class GeneratorData(TrainingData, Protocol):
    """What the training of a generator asks in addition, of images and of cached latents alike.

    Attributes:
        id2label: class id -> name; None without labels.
        has_captions: whether the rows have captions.
        text_encoder: the text encoder that has embedded the captions, {"source", "max_length", "width"}; None where
            captions come as texts, or not at all.
    """

    id2label: dict[int, str] | None
    has_captions: bool
    text_encoder: dict | None

    def class_names(self) -> dict[int, str]:
        """`id2label`.

        Raises:
            ValueError: there are no labels.
        """
        ...

    def load_tokenizer(self, path: str | None, image_encoder: str | None = None) -> torch.nn.Module:
        """The tokenizer for a new generator on these data, in fp32; with its frozen encoder where images are encoded.

        Args:
            path: Hub id or folder; None for the tokenizer stored with the data.
            image_encoder: Hub id or folder of the frozen encoder, for a tokenizer saved without it.

        Raises:
            ValueError: no tokenizer is named and none is stored, or it does not fit the data.
        """
        ...

    def prepare_tokenizer(self, vae: torch.nn.Module, image_encoder: str | None = None) -> None:
        """Make a loaded tokenizer ready for these data.

        Raises:
            ValueError: it does not fit them.
        """
        ...

    def latent_size(self, vae: torch.nn.Module) -> tuple[int, int]:
        """Height and width of the latents."""
        ...

    def check_caption_encoder(self, captions: CaptionEncoder) -> None:
        """Refuse a text encoder that does not fit cached caption embeddings.

        Raises:
            ValueError: another text encoder or another length.
        """
        ...


class DataWrapper:
    """Data whose batches are extended; all else is that of the wrapped data.

    Args:
        data: any `TrainingData`.
    """

    def __init__(self, data: TrainingData):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def extend(self, batch: dict) -> dict:
        """A training batch with the additional entries."""
        raise NotImplementedError

    def batches(self, batch_size: int, **position) -> Iterator[dict]:
        """As `TrainingData.batches`."""
        return map(self.extend, self.data.batches(batch_size, **position))

    def validation_batches(self, batch_size: int) -> Iterator[dict]:
        """As `TrainingData.validation_batches`."""
        return map(self.extend, self.data.validation_batches(batch_size))

    def signature(self, batch_size: int, world_size: int = 1, num_workers: int = 0) -> dict:
        """As `TrainingData.signature`."""
        return self.data.signature(batch_size, world_size, num_workers)

    def describe(self) -> str:
        """As `TrainingData.describe`."""
        return self.data.describe()

    def facts(self) -> dict:
        """As `TrainingData.facts`."""
        return self.data.facts()
