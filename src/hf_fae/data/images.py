"""Pictures for training: a Hub data set, local images, parquet files or WebDataset shards, streamed or not.

The order of a run is a function of the seed and of the number of images seen, never of a sampler's hidden state: batch
k of rank r is the same in a run that was interrupted and in one that was not. Damaged rows do not change that: another
row takes the place, and all others keep theirs.
"""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from ..images import from_uint8
from . import corrupt as damage
from .corrupt import MAX_ATTEMPTS, DamagedRow, DamageReport, first_good
from .decoding import center_crop, decode_image, lanczos_crop, random_crop
from .order import choose_row, group_rows, indexed_batches, is_mirrored, load_batches, row_random
from .reading import read_rows
from .splits import find_splits
from .streaming import StreamedRows, open_shard


__all__ = ["DataArguments", "ImageData"]


@dataclass
class DataArguments:
    """Which pictures to train on, and how they become tensors."""

    dataset_name: str = field(
        metadata={"help": "Hub id of a data set, or a local folder of images, parquet or WebDataset files."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices such as train[100:] work."})
    validation_split: str = field(default="validation", metadata={"help": "Split to validate on; slices work too."})
    image_column: str = field(
        default="image", metadata={"help": "Column of the pictures; in WebDataset files jpg, png, ..."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes; none: no labels."})
    num_classes: int | None = field(
        default=None,
        metadata={"help": "Labels are 0 to N-1; none: the column's names, or all of its values, read first."},
    )
    caption_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the captions, or json.caption for a field of the column json; none: no captions."
        },
    )
    balance_column: str | None = field(
        default=None, metadata={"help": "An epoch has one random row of each value of this column; none: all rows."}
    )
    resolution: int = field(default=256, metadata={"help": "Side of the square training pictures, in pixels."})
    crop: Literal["center", "random", "lanczos"] = field(
        default="center",
        metadata={"help": "Which square of a training picture: the middle, any of varying size, or U-ViT's middle."},
    )
    random_flip: bool = field(default=True, metadata={"help": "Mirror half of the training pictures."})
    min_image_side: int = field(default=16, metadata={"help": "Pictures with a shorter side are damaged rows."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; nothing is stored."})
    shuffle_block: int = field(
        default=1024, metadata={"help": "Streaming only: shards are shuffled, and rows within blocks of this many."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N rows only."})
    max_validation_samples: int = field(
        default=256, metadata={"help": "Validate on this many rows: a fixed random choice, or the first if streaming."}
    )


class ImageData:
    """The training and validation pictures of one data set, as batches.

    A batch is a dict of

    - "pixel_values": (B, 3, resolution, resolution) float32 in [-1, 1];
    - "class_labels": (B,) long, with a label column;
    - "captions": list of B strings, with a caption column;
    - "mirrored": (B,) bool, which pictures are mirrored (training only);
    - "row_ids": (B,) long, which rows these are: their numbers in the split; when training rows are streamed,
      10^9 x shard + number in the shard;
    - "damaged": list of (row id, kind) of the damaged rows that were met and replaced (training only).

    The place of a damaged row (see `damage.DAMAGE_KINDS`) is taken by a random other one.

    Of a local folder of pictures everything is the train split, unless its folders are splits (see
    `folders.find_splits`).

    Args:
        args: which data, and how to cut them.
        seed: of order, crops, mirroring, replacements and the choice of validation rows.

    Attributes:
        groups: with a balance column, the rows of each of its values, of which an epoch has one each; else None.
        id2label: class id -> name: the names of the `ClassLabel` column, else the numbers below `num_classes`, else
            the sorted values of the train split; None without a label column.
        has_captions: whether there is a caption column.
        num_shards: parts in which streamed training rows are read; None if they are not streamed.
        validation_damage: `DamageReport` of the last pass over the validation rows.

    Raises:
        ValueError: an argument is out of range, a column does not exist, labels are lists, it is not clear which
            folders are splits, or (when reading) 100 rows in a row are damaged.
    """

    def __init__(self, args: DataArguments, seed: int = 0):
        for name in ("resolution", "num_classes", "min_image_side", "shuffle_block", "max_train_samples"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if args.crop not in ("center", "random", "lanczos"):
            raise ValueError(f"crop must be 'center', 'random' or 'lanczos', got {args.crop!r}")
        self.args = args
        self.seed = seed
        self.validation_damage, self._validation_samples = DamageReport(), None
        self._splits = find_splits(args.dataset_name) if args.dataset_config is None else None
        self.train = self._open(args.train_split)
        if args.max_train_samples is not None:
            take = args.max_train_samples
            self.train = self.train.take(take) if args.streaming else self.train.take(min(take, len(self.train)))
        self.has_captions = args.caption_column is not None
        self.num_shards = self.groups = None
        if args.balance_column:
            if args.streaming:
                raise ValueError(f"balance_column must be None for streamed data, got {args.balance_column!r}")
            self.groups = group_rows(self.train[args.balance_column])
        if args.streaming:
            # The first N rows are not cut into shards, or they would depend on the number of readers.
            self.num_shards = self.train.num_shards if args.max_train_samples is None else 1
        self.id2label, self._label_ids = self._labels() if args.label_column else (None, None)

    def __len__(self) -> int:
        """Number of training rows (not known when streaming: TypeError)."""
        return len(self.train)

    def batches(
        self, batch_size: int, *, images_seen: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> Iterator[dict]:
        """Endless training batches of one process.

        Args:
            batch_size: images of this process in a batch.
            images_seen: images that all processes together have consumed before: where to go on.
            rank, world_size: this process, and how many share the data. Batches of the ranks laid side by side are
                what one process with the `world_size`-fold batch size gets (not so when streaming).
        """
        if not self.args.streaming:
            place = {"images_seen": images_seen, "rank": rank, "world_size": world_size, "num_workers": num_workers}
            return indexed_batches(_IndexedRows(self), _collate, self.seed, batch_size, **place)
        rows = StreamedRows(self, batch_size, images_seen // (batch_size * world_size), rank, world_size)
        return load_batches(rows, _collate, num_workers, batch_size=batch_size)

    def signature(self, batch_size: int, world_size: int = 1, num_workers: int = 0) -> dict:
        """What `images_seen` depends on to mean the same place: plain values, to be compared when a run is resumed.

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
            self._open(args.validation_split)
            validation = f"the first {args.max_validation_samples:,} rows"
        else:
            balance = f" ({len(self.groups):,} of them in an epoch)" if self.groups else ""
            train, validation = f"{len(self):,} rows{balance}", f"{len(self.rows('validation')[0]):,} rows"
        return (
            f"{train}{classes} of {args.dataset_name!r} ({args.train_split}); "
            f"validation: {validation} of {args.validation_split}"
        )

    def validation_batches(self, batch_size: int) -> Iterator[dict]:
        """The fixed validation pictures in a fixed order, unmirrored; the last batch may be smaller.

        Damaged rows are left out and noted in `validation_damage`.

        Raises:
            ValueError: no row is left.
        """
        examples = self._validation_examples()
        if (first := next(examples, None)) is None:
            raise ValueError(
                f"validation_split={self.args.validation_split!r} has no row that can be used: "
                f"{str(self.validation_damage) or 'it is empty'}"
            )
        examples = itertools.chain([first], examples)
        while batch := list(itertools.islice(examples, batch_size)):
            yield _collate(batch)

    def rows(self, split: Literal["train", "validation"]) -> tuple[Sequence[int], Sequence[dict]]:
        """The row ids and the undecoded rows of a split in their order, not of streamed data.

        For validation, the fixed random choice of `max_validation_samples`.
        """
        if split == "train":
            return range(len(self.train)), self.train
        rows = self._open(self.args.validation_split)
        chosen = np.random.default_rng(self.seed).permutation(len(rows))[: self.args.max_validation_samples]
        chosen = sorted(chosen.tolist())
        return chosen, rows.select(chosen)

    def has_split(self, name: str) -> bool:
        """Whether the data set has a split of this name, by the rule by which `ImageData` opens it."""
        if self._splits is not None:
            return name in self._splits
        from datasets import get_dataset_split_names

        return name in get_dataset_split_names(self.args.dataset_name, self.args.dataset_config)

    def facts(self) -> dict:
        """What a card tells of the data; `validation_samples` are those of the last pass, None before the first."""
        args = self.args
        return {
            "dataset": args.dataset_name,
            "split": args.train_split,
            "validation_split": args.validation_split,
            "resolution": args.resolution,
            "validation_samples": self._validation_samples,
        }

    def _validation_examples(self):
        self.validation_damage, self._validation_samples = DamageReport(), 0
        for row_id, row in self._validation_rows():
            try:
                yield {**self.example(row), "row_ids": row_id}
                self._validation_samples += 1
            except DamagedRow as error:
                self.validation_damage.add([(row_id, error.kind)])

    def _validation_rows(self):
        if not self.args.streaming:
            return zip(*self.rows("validation"), strict=True)
        rows = self._open(self.args.validation_split).take(self.args.max_validation_samples)
        return read_rows(rows, lambda number: self.validation_damage.add([(number, damage.BROKEN_SHARD)]))

    def _open(self, split):
        from datasets import Image, load_dataset

        args = self.args
        if self._splits is None:
            source = {"path": args.dataset_name, "name": args.dataset_config}
        else:
            source = {"path": "imagefolder", "data_dir": args.dataset_name, "data_files": self._splits}
        rows = load_dataset(**source, split=split, streaming=args.streaming)
        names = [args.image_column, args.label_column, args.caption_column, args.balance_column]
        columns = list(dict.fromkeys(self.find_column(rows, name) for name in names if name))
        # Decoding is ours: modes, transparency and orientation are handled in one place, and only where a row is used.
        return rows.select_columns(columns).cast_column(args.image_column, Image(decode=False))

    def find_column(self, rows, name: str) -> str:
        """The column in which `name` is found: itself or, of "json.caption", the column "json" with such a field.

        WebDataset files have both: a column "llava.txt", and fields of their JSON.

        Raises:
            ValueError: neither is there.
        """
        if rows.column_names is None or name in rows.column_names:
            return name
        column, _, field = name.partition(".")
        if column not in rows.column_names:
            raise ValueError(f"{self.args.dataset_name!r} has no column {name!r}; its columns are {rows.column_names}")
        fields = list(rows.features[column]) if isinstance(rows.features[column], dict) else []
        if field not in fields:
            raise ValueError(
                f"{self.args.dataset_name!r} has no field {name!r}; the fields of {column!r} are {fields}"
            )
        return column

    def _labels(self):
        """Class id -> name, and cell value -> class id."""
        from datasets import ClassLabel, Value

        column = self.args.label_column
        feature = (self.train.features or {}).get(column)
        if feature is not None and not isinstance(feature, (ClassLabel, Value)):
            raise ValueError(f"label_column must hold one value per row, but {column!r} holds {feature}")
        if isinstance(feature, ClassLabel):
            if self.args.num_classes not in (None, len(feature.names)):
                raise ValueError(
                    f"num_classes={self.args.num_classes}, but column {column!r} has {len(feature.names)} classes"
                )
            return dict(enumerate(feature.names)), {index: index for index in range(len(feature.names))}
        if self.args.num_classes is not None:
            values = range(self.args.num_classes)
        else:
            values = sorted(value for value in self._label_values() if value is not None)
        return {i: str(value) for i, value in enumerate(values)}, {value: i for i, value in enumerate(values)}

    def _label_values(self):
        """All values of the label column."""
        column = self.args.label_column
        if not self.args.streaming:
            return self.train.unique(column)
        rows, values = self.train.select_columns([column]), set()
        for shard in range(self.num_shards):
            for _, row in read_rows(open_shard(rows, self.num_shards, shard), lambda number: None):
                if not isinstance(row[column], Hashable):
                    raise ValueError(f"label_column must hold one value per row, but {column!r} holds {row[column]}")
                values.add(row[column])
        return values

    def class_label(self, row: dict) -> int:
        """The class id of a row.

        Raises:
            DamagedRow: it has none.
        """
        column = self.args.label_column
        label = row[column]
        if not isinstance(label, Hashable) or label not in self._label_ids:
            raise DamagedRow(
                damage.BAD_LABEL,
                f"column {column!r} holds {label!r}, which is none of the {len(self.id2label)} classes "
                f"of split {self.args.train_split!r}",
            )
        return self._label_ids[label]

    def caption(self, row: dict) -> str:
        """The caption of a row, without the white space around it.

        Half a surrogate pair, which JSON may have and no tokenizer takes, becomes a question mark.

        Raises:
            DamagedRow: it has none.
        """
        name = self.args.caption_column
        if name in row:
            caption = row[name]
        else:
            column, _, field = name.partition(".")
            caption = row[column].get(field) if isinstance(row[column], dict) else None
        if not isinstance(caption, str) or not caption.strip():
            raise DamagedRow(damage.NO_CAPTION, f"column {name!r} holds {caption!r}")
        return caption.strip().encode(errors="replace").decode()

    def example(self, row: dict, random: np.random.Generator | None = None) -> dict:
        """A row as tensors and text: cropped and mirrored at random if there are random numbers to draw from.

        Raises:
            DamagedRow: the row cannot be used.
        """
        args, example = self.args, {}
        if args.label_column:
            example["class_labels"] = self.class_label(row)
        if args.caption_column:
            example["captions"] = self.caption(row)
        try:
            image = decode_image(row[args.image_column], args.min_image_side)
        except FileNotFoundError as error:
            raise DamagedRow(damage.EMPTY, str(error)) from error
        if random is not None and args.crop == "random":
            image = random_crop(image, args.resolution, random)
        else:
            crop = lanczos_crop if args.crop == "lanczos" else center_crop
            image = crop(image, args.resolution)
        pixels = from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if random is not None:
            example["mirrored"] = args.random_flip and is_mirrored(random)
            pixels = pixels.flip(-1) if example["mirrored"] else pixels
        return {"pixel_values": pixels.contiguous(), **example}


class _IndexedRows(Dataset):
    """The example of each (epoch, place in it); a damaged row is replaced by any of the split."""

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


def _collate(examples):
    """Tensors of all but the captions and the damaged rows, which are lists."""
    lists = {}
    if "captions" in examples[0]:
        lists["captions"] = [example.pop("captions") for example in examples]
    if "damaged" in examples[0]:
        lists["damaged"] = [row for example in examples for row in example.pop("damaged")]
    return {**torch.utils.data.default_collate(examples), **lists}
