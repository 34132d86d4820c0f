"""The rows that all stages train on: parquet files that name the images of a folder, with a fixed validation part."""

import random
import shutil
from collections import defaultdict
from pathlib import Path

from .folder import ImageFolder


__all__ = ["ONE_CLASS", "VALIDATION_SHARE", "split", "write_rows"]

VALIDATION_SHARE = 0.1
LINK = ".images"
ONE_CLASS = "image"  # of a folder without classes: training without a condition is training on a single class


def split(folder: ImageFolder, condition: str) -> dict[str, list]:
    """The images for training and for validation: a tenth of each class, at random with a fixed seed.

    A class with a single image is only trained on.
    """
    groups = defaultdict(list)
    for image in folder.images:
        if condition != "captions" or image.caption:
            groups[image.label if condition == "classes" else ONE_CLASS].append(image)
    parts = {"train": [], "validation": []}
    for label in sorted(groups):
        images = groups[label]
        random.Random(label).shuffle(images)
        count = min(len(images) - 1, max(1, round(len(images) * VALIDATION_SHARE)))
        parts["validation"] += images[:count]
        parts["train"] += images[count:]
    parts["validation"] = parts["validation"] or parts["train"][:1]  # a class for each image: its loss is no measure
    return parts


def write_rows(folder: ImageFolder, condition: str, path: Path) -> None:
    """Write `path/train.parquet` and `path/validation.parquet`; `path` exists only when both are complete.

    The rows name images through the link `path/.images`: a data set reads no files outside of its own folder.
    """
    import pyarrow
    from pyarrow import parquet

    if path.is_dir():
        return
    part = path.with_name(f".{path.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    (part / LINK).symlink_to(folder.path, target_is_directory=True)
    images_at = path.absolute() / LINK
    for name, images in split(folder, condition).items():
        columns = {"image": [{"bytes": None, "path": str(images_at / image.name)} for image in images]}
        if condition == "captions":
            columns["caption"] = [image.caption for image in images]
        else:
            columns["label"] = [image.label if condition == "classes" else ONE_CLASS for image in images]
        cell = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
        fields = [(column, cell if column == "image" else pyarrow.string()) for column in columns]
        parquet.write_table(pyarrow.table(columns, schema=pyarrow.schema(fields)), part / f"{name}.parquet")
    part.rename(path)
