"""The 8-bit images of a data set, by number."""

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


__all__ = ["NumberedImages", "ImageArguments"]


@dataclass
class ImageArguments:
    """The images to measure on."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id of a data set, or a local folder of images, parquet or WebDataset files."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of the data set."})
    split: str = field(default="validation", metadata={"help": "Split to measure on; slices such as train[9:] work."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the captions, or json.caption for a field of the column json."}
    )
    crop: Literal["center", "lanczos"] = field(
        default="center",
        metadata={"help": "Center crops as in ADM, or as in U-ViT, for text to image on COCO."},
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Measure on a fixed random subset of N rows (default: all)."}
    )

    def open(self, resolution: int, seed: int = 0, train_split: str | None = None) -> ImageData:
        """Open the data set without decoding images.

        Args:
            resolution: side of the square images.
            seed: of the random subset.
            train_split: split to train classifiers on, which defines the classes; by default `split`.

        Raises:
            ValueError: no data set, arguments that do not fit it, or splits that overlap.
        """
        if self.dataset_name is None:
            raise ValueError("dataset_name must name the images to measure on, got None")
        if self.dataset_name.endswith(".npz"):
            raise ValueError(
                f"dataset_name must be a data set, got {self.dataset_name!r}: an npz is a reference for generated "
                "images alone"
            )
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {self.max_samples}")
        columns = [name for name in (self.image_column, self.label_column, self.caption_column) if name]
        if len(set(columns)) < len(columns):
            raise ValueError(f"image_column, label_column and caption_column must differ, got {', '.join(columns)}")
        if not isinstance(resolution, int):
            raise ValueError(f"model must have square images, got {resolution}")
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
    """Require disjoint splits; these may be slices, such as train[:90%]."""
    from datasets import ReadInstruction

    sizes = {name: info.num_examples for name, info in (data.train.info.splits or {}).items()}
    ranges = [
        [(part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to) for part in parts]
        for parts in (ReadInstruction.from_spec(spec).to_absolute(sizes) for spec in (train_split, split))
    ]
    for name, start, end in ranges[0]:
        if any(name == other and start < stop and begin < end for other, begin, stop in ranges[1]):
            raise ValueError(f"train_split {train_split!r} must be disjoint from split, got {split!r}")


class NumberedImages:
    """The images of one split, with the data set's crop, by default that of ADM.

    Args:
        data: the data set.
        split: its train or validation split; of the latter, the subset that `data` selects.
    """

    def __init__(self, data: ImageData, split: str = "validation"):
        self.data, self.split = data, split
        _, self.rows = data.rows(split)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, numbers: list[int]) -> "NumberedImages":
        """A subset of the images, in the order of these numbers."""
        chosen = copy.copy(self)
        chosen.rows = self.rows.select(numbers)
        return chosen

    def describe(self) -> dict:
        """Identifies the images, JSON-able."""
        args = self.data.args
        split = args.train_split if self.split == "train" else args.validation_split
        rows = {"split": split, "fingerprint": self.fingerprint, "count": len(self)}
        return {"dataset": args.dataset_name, **rows, "crop": args.crop}

    @property
    def fingerprint(self) -> str:
        """Hash of images, labels and captions, independent of paths (see `fingerprint_rows`)."""
        return fingerprint_rows(self.data, self.rows)

    def captions(self) -> list[str]:
        """The captions of all rows that have one, in order."""
        column, captions = self.data.find_column(self.rows, self.data.args.caption_column), []
        for row in self.rows.select_columns([column]):
            with contextlib.suppress(CorruptRow):
                captions.append(self.data.caption(row))
        return captions

    def read(self, numbers: range) -> dict:
        """Decode images by number, in threads.

        Returns:
            "images": (B, 3, H, W) uint8; corrupt rows give black images, so that the others keep their positions.
            "is_good": (B,) bool.
            "class_labels": (B,) long and "captions", list of strings, if the data set has these columns.
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
