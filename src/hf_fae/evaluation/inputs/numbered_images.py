"""The pictures of a data set by number, 8 bits deep: what evaluations measure on."""

import contextlib
import copy
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch

from ...data.corrupt import CorruptRow
from ...data.fingerprints import fingerprint_rows
from ...data.images import DataArguments, ImageData
from ...images import to_uint8


__all__ = ["NumberedPictures", "PictureArguments"]


@dataclass
class PictureArguments:
    """Which pictures to measure on."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id of a data set, or a local folder of images, parquet or WebDataset files."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of the data set."})
    split: str = field(default="validation", metadata={"help": "Split to measure on; slices such as train[9:] work."})
    image_column: str = field(default="image", metadata={"help": "Column of the pictures."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the captions, or json.caption for a field of the column json."}
    )
    crop: Literal["center", "lanczos"] = field(
        default="center",
        metadata={"help": "How squares are cut out: as ADM does it, or as U-ViT, for text to image on COCO."},
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Measure on a fixed random choice of N rows; none: on all of them."}
    )

    def open(self, resolution: int, seed: int = 0, train_split: str | None = None) -> ImageData:
        """The data set, not yet its pictures.

        Args:
            resolution: side of the square pictures.
            seed: of the random choice.
            train_split: where classifiers learn, whose classes are those of the data; by default `split`.

        Raises:
            ValueError: there is no data set, an argument does not fit it, or the splits have rows in common.
        """
        if self.dataset_name is None:
            raise ValueError("dataset_name must name the pictures to measure on, got None")
        if self.dataset_name.endswith(".npz"):
            raise ValueError(
                f"dataset_name must be a data set, got {self.dataset_name!r}: an npz is a reference for generated "
                "pictures, with which nothing else may be compared"
            )
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {self.max_samples}")
        columns = [name for name in (self.image_column, self.label_column, self.caption_column) if name]
        if len(set(columns)) < len(columns):
            raise ValueError(f"image_column, label_column and caption_column must differ, got {', '.join(columns)}")
        if not isinstance(resolution, int):
            raise ValueError(f"model must take squares, got one for pictures of {resolution}")
        try:
            data = self._open(resolution, seed, train_split)
        except (ValueError, OSError) as error:
            place = f"dataset_name {self.dataset_name!r}, split {self.split!r}"
            raise ValueError(f"{place}, cannot be read: {error}") from error
        if train_split is not None:
            _check_disjoint(train_split, self.split, data)
        return data

    def _open(self, resolution, seed, train_split):
        return ImageData(
            DataArguments(
                dataset_name=self.dataset_name,
                dataset_config=self.dataset_config,
                train_split=train_split or self.split,
                validation_split=self.split,
                image_column=self.image_column,
                label_column=self.label_column,
                caption_column=self.caption_column,
                crop=self.crop,
                resolution=resolution,
                random_flip=False,
                max_validation_samples=self.max_samples or 10**9,
            ),
            seed,
        )


def _check_disjoint(train_split, split, data):
    """Refuse to measure on what was learned: splits may be slices, such as train[:90%]."""
    from datasets import ReadInstruction

    sizes = {name: info.num_examples for name, info in (data.train.info.splits or {}).items()}
    ranges = [
        [(part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to) for part in parts]
        for parts in (ReadInstruction.from_spec(spec).to_absolute(sizes) for spec in (train_split, split))
    ]
    for name, start, end in ranges[0]:
        if any(name == other and start < stop and begin < end for other, begin, stop in ranges[1]):
            raise ValueError(f"train_split {train_split!r} must have no rows of split, got {split!r}")


class NumberedPictures:
    """The pictures of one split, cropped as its data set says: by default as ADM does it.

    Args:
        data: the data set.
        split: its train or its validation split; of the latter, the choice that `data` makes.
    """

    def __init__(self, data: ImageData, split: str = "validation"):
        self.data, self.split = data, split
        _, self.rows = data.rows(split)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, numbers: list[int]) -> "NumberedPictures":
        """Some of the pictures, in the order of these numbers."""
        chosen = copy.copy(self)
        chosen.rows = self.rows.select(numbers)
        return chosen

    def describe(self) -> dict:
        """Which pictures these are, JSON-able."""
        args = self.data.args
        split = args.train_split if self.split == "train" else args.validation_split
        rows = {"split": split, "fingerprint": self.fingerprint, "count": len(self)}
        return {"dataset": args.dataset_name, **rows, "crop": args.crop}

    @property
    def fingerprint(self) -> str:
        """Of the pictures, labels and captions, wherever their files lie (see `fingerprint_rows`)."""
        return fingerprint_rows(self.data, self.rows)

    def captions(self) -> list[str]:
        """Those of all rows that have one, in their order."""
        column, captions = self.data.find_column(self.rows, self.data.args.caption_column), []
        for row in self.rows.select_columns([column]):
            with contextlib.suppress(CorruptRow):
                captions.append(self.data.caption(row))
        return captions

    def read(self, numbers: range) -> dict:
        """Pictures by their numbers, decoded in threads.

        Returns:
            "images": (B, 3, H, W) uint8; those of damaged rows are black, so that the others keep their places.
            "is_good": (B,) bool.
            "class_labels": (B,) long, "captions": list of strings, where there are columns of these.
        """
        args = self.data.args
        blank = {"pixel_values": torch.full((3, args.resolution, args.resolution), -1.0)}
        if args.label_column:
            blank["class_labels"] = 0
        if args.caption_column:
            blank["captions"] = ""

        def read(row):
            try:
                return {**self.data.example(row), "is_good": True}
            except CorruptRow:
                return {**blank, "is_good": False}

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            examples = list(pool.map(read, [self.rows[number] for number in numbers]))
        batch = {name: [example[name] for example in examples] for name in examples[0]}
        batch["images"] = to_uint8(torch.stack(batch.pop("pixel_values")))
        batch["is_good"] = torch.tensor(batch["is_good"])
        if args.label_column:
            batch["class_labels"] = torch.tensor(batch["class_labels"])
        return batch
