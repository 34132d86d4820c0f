"""From a row of a data set to an example: pixels, class and caption."""

from collections.abc import Hashable

import numpy as np
import torch

from ..images import from_uint8
from .corrupt import BAD_LABEL, NO_CAPTION, CorruptRow
from .decoding import center_crop, decode_image, lanczos_crop, pad_to_square, random_crop
from .order import is_mirrored
from .own_paths import check_inside
from .source import DataArguments


__all__ = ["ExampleReader", "collate_examples"]


class ExampleReader:
    """Decodes rows.

    Args:
        args: which columns to read, and how to crop.
        label_ids: value of the label column -> class id; None without a label column.
    """

    def __init__(self, args: DataArguments, label_ids: dict | None):
        self.args, self.label_ids = args, label_ids

    def read(self, row: dict, random: np.random.Generator | None = None) -> dict:
        """A row as tensors and text: cropped and mirrored at random if random numbers are given.

        Raises:
            CorruptRow: the row cannot be used.
        """
        args, example = self.args, {}
        if args.label_column:
            example["class_labels"] = self.class_label(row)
        if args.caption_column:
            example["captions"] = self.caption(row)
        image = decode_image(self._cell(row[args.image_column]), args.min_image_side)
        if random is not None and args.crop == "random":
            image = random_crop(image, args.resolution, random)
        else:
            crop = {"lanczos": lanczos_crop, "pad": pad_to_square}.get(args.crop, center_crop)
            image = crop(image, args.resolution)
        pixels = from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if random is not None:
            example["mirrored"] = args.random_flip and is_mirrored(random)
            pixels = pixels.flip(-1) if example["mirrored"] else pixels
        return {"pixel_values": pixels.contiguous(), **example}

    def _cell(self, cell):
        """A cell with an image, whose path, if it has no bytes, belongs to the data set."""
        if isinstance(cell, dict) and cell.get("bytes") is None:
            check_inside(cell.get("path"), self.args.dataset_name)
        return cell

    def class_label(self, row: dict) -> int:
        """The class id of a row.

        Raises:
            CorruptRow: it has none.
        """
        column = self.args.label_column
        label = row[column]
        if not isinstance(label, Hashable) or label not in self.label_ids:
            raise CorruptRow(
                BAD_LABEL,
                f"column {column!r} holds {label!r}, which is none of the {len(self.label_ids)} classes "
                f"of split {self.args.train_split!r}",
            )
        return self.label_ids[label]

    def caption(self, row: dict) -> str:
        """The caption of a row, without surrounding white space.

        Half a surrogate pair, which JSON can hold and no text encoder accepts, becomes a question mark.

        Raises:
            CorruptRow: it has none.
        """
        name = self.args.caption_column
        if name in row:
            caption = row[name]
        else:
            column, _, field = name.partition(".")
            caption = row[column].get(field) if isinstance(row[column], dict) else None
        if not isinstance(caption, str) or not caption.strip():
            raise CorruptRow(NO_CAPTION, f"column {name!r} holds {caption!r}")
        return caption.strip().encode(errors="replace").decode()


def collate_examples(examples: list[dict]) -> dict:
    """A batch of examples: tensors, except for "captions" and "corrupt", which are lists."""
    lists = {}
    if "captions" in examples[0]:
        lists["captions"] = [example.pop("captions") for example in examples]
    if "corrupt" in examples[0]:
        lists["corrupt"] = [row for example in examples for row in example.pop("corrupt")]
    return {**torch.utils.data.default_collate(examples), **lists}
