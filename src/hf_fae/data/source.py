"""Which images to train on: the arguments, and the data set that they name, with its columns and classes."""

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from .location import load_split, split_names
from .reading import read_rows
from .streaming import open_shard


__all__ = ["DataArguments", "ImageSource"]

# How base64 text of PNG, JPEG, GIF and WebP files begins, one of which looks like a path.
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
LISTS = ("List", "LargeList", "Sequence")  # features of `datasets`, by version


@dataclass
class DataArguments:
    """Which images to train on, and how they become tensors."""

    dataset_name: str = field(
        metadata={"help": "Hub id of a data set, or a local folder of images, parquet or WebDataset files."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices such as train[100:] work."})
    validation_split: str = field(default="validation", metadata={"help": "Split to validate on; slices work too."})
    image_column: str = field(
        default="image", metadata={"help": "Column of the images; in WebDataset files jpg, png, ..."}
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
        default=None, metadata={"help": "An epoch has one random row per value of this column; none: all rows."}
    )
    resolution: int = field(default=256, metadata={"help": "Side of the square training images, in pixels."})
    crop: Literal["center", "random", "lanczos", "pad"] = field(
        default="center",
        metadata={
            "help": "Square of a training image: center, random (of varying size), lanczos (U-ViT's), or pad (white)."
        },
    )
    random_flip: bool = field(default=True, metadata={"help": "Mirror half of the training images."})
    min_image_side: int = field(default=16, metadata={"help": "Images with a shorter side count as corrupt rows."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; nothing is stored."})
    shuffle_block: int = field(
        default=1024, metadata={"help": "Streaming only: shuffle shards, and rows within blocks of this many."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N rows only."})
    max_validation_samples: int = field(
        default=256, metadata={"help": "Validate on this many rows: a fixed random choice, or the first if streaming."}
    )


class ImageSource:
    """The undecoded rows of a data set, split by split, and its classes.

    In a local folder of images everything belongs to the train split, unless its folders are splits (see
    `splits.find_splits`).

    Args:
        args: which data.

    Attributes:
        train: the training rows, a `datasets.Dataset`, or an `IterableDataset` when streaming.
        num_shards: number of parts in which streamed training rows are read; None if they are not streamed.
        id2label: class id -> name: the names of the `ClassLabel` column, else the numbers below `num_classes`, else
            the sorted values of the train split; None without a label column.
        label_ids: value of the label column -> class id; None without a label column.

    Raises:
        ValueError: a column does not exist, labels are lists, or it is not clear which folders are splits.
    """

    def __init__(self, args: DataArguments):
        self.args = args
        self.train = self.open(args.train_split)
        if args.max_train_samples is not None:
            count = args.max_train_samples
            self.train = self.train.take(count if args.streaming else min(count, len(self.train)))
        self.num_shards = None
        if args.streaming:
            # The first N rows are not split into shards, or they would depend on the number of readers.
            self.num_shards = self.train.num_shards if args.max_train_samples is None else 1
        self.id2label, self.label_ids = self._read_classes() if args.label_column else (None, None)

    def open(self, split: str):
        """The rows of a split or slice, with the columns that the arguments name, images undecoded."""
        from datasets import Image

        args = self.args
        rows = load_split(
            args.dataset_name, args.dataset_config, split, args.streaming, has_labels=args.label_column == "label"
        )
        names = [args.image_column, args.label_column, args.caption_column, args.balance_column]
        columns = list(dict.fromkeys(self.find_column(rows, name) for name in names if name))
        self._check_images(rows)
        # We decode ourselves: modes, transparency and orientation are handled in one place, and only for rows in use.
        return rows.select_columns(columns).cast_column(args.image_column, Image(decode=False))

    def has_split(self, name: str) -> bool:
        """Whether the data set has a split of this name, by the rule that `open` follows."""
        return name in split_names(self.args.dataset_name, self.args.dataset_config)

    def _check_images(self, rows):
        """Refuse a column that holds anything but images or their paths."""
        from datasets import Value

        column = self.args.image_column
        feature = (rows.features or {}).get(column)
        if isinstance(feature, (list, dict)) and set(feature) != {"bytes", "path"} or type(feature).__name__ in LISTS:
            raise ValueError(f"image_column must hold one image per row, but {column!r} holds {feature}")
        if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
            value = next(iter(rows.take(1)), {}).get(column) or ""
            text = re.sub(r"^data:image/[a-z+.-]+;base64,", "", value)
            is_encoded = len(text) > 255 or text != value or text.startswith(BASE64_STARTS)
            if is_encoded and re.fullmatch(r"[A-Za-z0-9+/_\s-]+=*", text):
                raise ValueError(
                    f"image_column must hold images or their paths, but {column!r} holds base64 text: store the bytes "
                    "that base64.b64decode returns"
                )

    def find_column(self, rows, name: str) -> str:
        """The column that holds `name`: that column itself or, for "json.caption", the column "json" with this field.

        WebDataset files have both: a column "llava.txt", and fields of their JSON.

        Raises:
            ValueError: neither exists.
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

    def _read_classes(self):
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
