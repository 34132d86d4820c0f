"""Images for training: a Hub data set, local images, parquet files or WebDataset shards, streamed or not.

The row order of a run is a function of the seed and of the number of images seen, never of a sampler's hidden state:
batch k of rank r is the same in a run that was interrupted and in one that was not. Corrupt rows do not change that:
another row replaces them, and all others keep their positions.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from ..autoencoders.initialization import complete_tokenizer
from ..latents import latent_size
from ..loading import load_tokenizer
from .captions import CaptionEncoder
from .corrupt import BROKEN_SHARD, MAX_ATTEMPTS, CorruptionReport, CorruptRow, first_good
from .examples import ExampleReader, collate_examples
from .fingerprints import fingerprint_rows
from .order import choose_row, group_rows, indexed_batches, load_batches, row_random
from .reading import read_rows
from .source import DataArguments, ImageSource
from .streaming import StreamedRows


__all__ = ["DataArguments", "ImageData"]


class ImageData(ImageSource):
    """The training and validation images of one data set, as batches: a `GeneratorData`.

    A batch is a dict of

    - "pixel_values": (B, 3, resolution, resolution) float32 in [-1, 1];
    - "class_labels": (B,) long, with a label column;
    - "captions": list of B strings, with a caption column;
    - "mirrored": (B,) bool, which images are mirrored (training only);
    - "row_ids": (B,) long, the rows' numbers in the split; for streamed training rows, 10^9 x shard + number in the
      shard;
    - "corrupt": list of (row id, kind) of the corrupt rows that were met and replaced (training only).

    A random other row replaces a corrupt one (see `corrupt.CORRUPTION_KINDS`).

    Args:
        args: which data, and how to crop them.
        seed: of order, crops, mirroring, replacements and the choice of validation rows.

    Attributes:
        groups: with a balance column, the rows of each of its values, one of which an epoch has; else None.
        has_captions: whether there is a caption column.
        corrupt_validation_rows: `CorruptionReport` of the last pass over the validation rows.

    The others are those of `ImageSource`.

    Raises:
        ValueError: an argument is out of range, as `ImageSource`, or (when reading) 100 rows in a row are corrupt.
    """

    text_encoder = None  # captions come as texts

    def __init__(self, args: DataArguments, seed: int = 0):
        for name in ("resolution", "num_classes", "min_image_side", "shuffle_block", "max_train_samples"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if args.crop not in ("center", "random", "lanczos", "pad"):
            raise ValueError(f"crop must be 'center', 'random', 'lanczos' or 'pad', got {args.crop!r}")
        super().__init__(args)
        self.seed = seed
        self.corrupt_validation_rows, self._validation_samples = CorruptionReport(), None
        self.has_captions = args.caption_column is not None
        self.groups = None
        if args.balance_column:
            if args.streaming:
                raise ValueError(f"balance_column must be None for streamed data, got {args.balance_column!r}")
            self.groups = group_rows(self.train[args.balance_column])
        self.reader = ExampleReader(args, self.label_ids)

    def __len__(self) -> int:
        """Number of training rows (unknown when streaming: TypeError)."""
        return len(self.train)

    def example(self, row: dict, random: np.random.Generator | None = None) -> dict:
        """As `ExampleReader.read`."""
        return self.reader.read(row, random)

    def caption(self, row: dict) -> str:
        """As `ExampleReader.caption`."""
        return self.reader.caption(row)

    def batches(
        self, batch_size: int, *, images_seen: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> Iterator[dict]:
        """Endless training batches of one process, as `TrainingData.batches`.

        The batches of all ranks side by side are the batch that a single process with `world_size` times the batch
        size gets; not so when streaming.
        """
        if not self.args.streaming:
            position = {"images_seen": images_seen, "rank": rank, "world_size": world_size, "num_workers": num_workers}
            return indexed_batches(_IndexedRows(self), collate_examples, self.seed, batch_size, **position)
        rows = StreamedRows(self, batch_size, images_seen // (batch_size * world_size), rank, world_size)
        return load_batches(rows, collate_examples, num_workers, batch_size=batch_size)

    def signature(self, batch_size: int, world_size: int = 1, num_workers: int = 0) -> dict:
        """Plain values under which `images_seen` means the same position; compared when a run is resumed.

        Indexed rows have one order for all; that of streamed ones depends on who reads them.
        """
        args = self.args
        signature = {"split": args.train_split, "seed": self.seed}
        if not args.streaming:
            return {"rows": len(self), **signature} | ({"groups": len(self.groups)} if self.groups else {})
        return {
            "shards": self.num_shards,
            **signature,
            "max_train_samples": args.max_train_samples,
            "shuffle_block": args.shuffle_block,
            "batch_size": batch_size,
            "world_size": world_size,
            "num_workers": max(1, num_workers),
        }

    def describe(self) -> str:
        """Rows, classes and splits in one line, for the start of a run.

        Raises:
            ValueError: there is no validation split.
        """
        args = self.args
        classes = f" in {len(self.id2label):,} classes" if self.id2label is not None else ""
        if args.streaming:
            limit = args.max_train_samples
            train = f"{self.num_shards:,} streamed shards" if limit is None else f"the first {limit:,} streamed rows"
            self.open(args.validation_split)
            validation = f"the first {args.max_validation_samples:,} rows"
        else:
            balance = f" ({len(self.groups):,} of them in an epoch)" if self.groups else ""
            train, validation = f"{len(self):,} rows{balance}", f"{len(self.rows('validation')[0]):,} rows"
        return (
            f"{train}{classes} of {args.dataset_name!r} ({args.train_split}); "
            f"validation: {validation} of {args.validation_split}"
        )

    def facts(self) -> dict:
        """As `TrainingData.facts`; "validation_samples" is that of the last pass, None before the first."""
        args = self.args
        return {
            "dataset": args.dataset_name,
            "split": args.train_split,
            "validation_split": args.validation_split,
            "resolution": args.resolution,
            "validation_samples": self._validation_samples,
        }

    def validation_batches(self, batch_size: int) -> Iterator[dict]:
        """The fixed validation images in a fixed order, unmirrored; the last batch may be smaller.

        Corrupt rows are left out and recorded in `corrupt_validation_rows`.

        Raises:
            ValueError: no row is left.
        """
        examples = self._validation_examples()
        if (first := next(examples, None)) is None:
            raise ValueError(
                f"validation_split={self.args.validation_split!r} has no row that can be used: "
                f"{str(self.corrupt_validation_rows) or 'it is empty'}"
            )
        examples = itertools.chain([first], examples)
        while batch := list(itertools.islice(examples, batch_size)):
            yield collate_examples(batch)

    def rows(self, split: Literal["train", "validation"]) -> tuple[Sequence[int], Sequence[dict]]:
        """The row ids and the undecoded rows of a split in their order; not of streamed data.

        For validation, the fixed random choice of `max_validation_samples`.
        """
        if split == "train":
            return range(len(self.train)), self.train
        rows = self.open(self.args.validation_split)
        chosen = np.random.default_rng(self.seed).permutation(len(rows))[: self.args.max_validation_samples]
        chosen = sorted(chosen.tolist())
        return chosen, rows.select(chosen)

    def fingerprint(self, split: Literal["train", "validation"]) -> str:
        """Hash of the content of a split's rows, see `fingerprint_rows`."""
        return fingerprint_rows(self, self.rows(split)[1])

    def class_names(self) -> dict[int, str]:
        """As `GeneratorData.class_names`."""
        if self.id2label is None:
            raise ValueError("label_column must name the column of the classes, got None")
        return self.id2label

    def load_tokenizer(self, path: str | None, image_encoder: str | None = None):
        """As `GeneratorData.load_tokenizer`: one must be named."""
        if path is None:
            raise ValueError("vae must name the tokenizer for training on images, got None")
        vae = load_tokenizer(path)
        self.prepare_tokenizer(vae, image_encoder)
        return vae

    def prepare_tokenizer(self, vae, image_encoder: str | None = None) -> None:
        """As `complete_tokenizer`, for images of `resolution`."""
        complete_tokenizer(vae, image_encoder, self.args.resolution)

    def latent_size(self, vae) -> tuple[int, int]:
        """As `GeneratorData.latent_size`."""
        return latent_size(vae, self.args.resolution, self.args.resolution)

    def check_caption_encoder(self, captions: CaptionEncoder) -> None:
        """Accepts any text encoder, as no caption is embedded yet."""

    def _validation_examples(self):
        self.corrupt_validation_rows, self._validation_samples = CorruptionReport(), 0
        for row_id, row in self._validation_rows():
            try:
                yield {**self.example(row), "row_ids": row_id}
                self._validation_samples += 1
            except CorruptRow as error:
                self.corrupt_validation_rows.add([(row_id, error.kind)])

    def _validation_rows(self):
        if not self.args.streaming:
            return zip(*self.rows("validation"), strict=True)
        rows = self.open(self.args.validation_split).take(self.args.max_validation_samples)
        return read_rows(rows, lambda number: self.corrupt_validation_rows.add([(number, BROKEN_SHARD)]))


class _IndexedRows(Dataset):
    """The example at each (epoch, index); any row of the split replaces a corrupt one."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data.groups or self.data.train)

    def __getitem__(self, key):
        return first_good(self.data.example, self._candidates(*key))

    def _candidates(self, epoch, index):
        rows, first = self.data.train, choose_row(self.data.groups, self.data.seed, epoch, index)
        for attempt in range(MAX_ATTEMPTS):
            random = row_random(self.data.seed, epoch, index, attempt)
            row_id = int(random.integers(len(rows))) if attempt else first
            yield row_id, rows[row_id], random
