"""Which files of a local folder of images belong to which split.

`datasets` looks for words such as "train" and "test" in all file and folder names and keeps only matching files: one
image called `steam-train-1.png` would be the whole train split. Here only folders at one level can be splits.
"""

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

from .image_files import FORMATS


__all__ = ["ImageSplits", "find_splits", "split_of"]

SPLIT_FOLDERS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|evaluation|eval",
}
CONTAINERS = {".arrow", ".gz", ".parquet", ".tar", ".tgz", ".zip"}


class ImageSplits(NamedTuple):
    """What one look at a folder of images finds.

    Attributes:
        patterns: split -> glob patterns of its images, relative to the folder.
        places: the folders that hold these images, below those of their splits, as tuples of names.
        has_metadata: there is a file `metadata.*`, of which `datasets` makes columns.
    """

    patterns: dict[str, list[str]]
    places: set[tuple[str, ...]]
    has_metadata: bool


def find_splits(folder: str) -> ImageSplits | None:
    """The images of each split.

    If all top-level folders are named like splits (`train/`, `val/`, `test_images/`), they are the splits; images next
    to them belong to none. A single folder around them does not count as a level. Otherwise every image is a training
    image, whatever its own name or that of its class.

    Returns:
        None where `datasets` decides: `folder` is no local folder, consists of data files (parquet, tar, ...), or its
        README.md declares the splits.

    Raises:
        ValueError: some folders are named like splits, including train, and others are not; or there are images that
            `datasets` would leave out, behind symbolic links or with an ending that it does not know.
    """
    root = Path(folder)
    if not root.is_dir() or _has_configs(root / "README.md"):
        return None
    found, images, containers, left_out, has_metadata = _scan(root)
    if left_out:
        raise ValueError(
            f"dataset_name {folder!r} has {len(left_out)} images that would be left out, {', '.join(left_out[:3])}"
            f"{', ...' * (len(left_out) > 3)}: put real folders in the place of links, and convert images to PNG, "
            "JPEG or WebP"
        )
    if containers >= images:
        return None
    above, places = (), found
    while len({place[:1] for place in places}) == 1 and () not in places:
        name = next(iter(places))[0]
        if split_of(name):
            break
        above, places = (*above, name), {place[1:] for place in places}
    names = sorted({place[0] for place in places if place})
    splits = {name: split_of(name) for name in names if split_of(name)}
    if splits and len(splits) == len(names):
        patterns: dict[str, list[str]] = {}
        for name, split in splits.items():
            patterns.setdefault(split, []).append("/".join([*map(glob.escape, (*above, name)), "**"]))
        return ImageSplits(patterns, {place[1:] for place in places if place}, has_metadata)
    if "train" in splits.values() and len(set(splits.values())) > 1:
        others = [name for name in names if name not in splits]
        raise ValueError(
            f"dataset_name {folder!r} has folders named like splits, {', '.join(splits)}, and others, "
            f"{', '.join(others[:5])}{', ...' * (len(others) > 5)}: remove the others, or put all into one train/"
        )
    return ImageSplits({"train": ["**"]}, found, has_metadata)


def split_of(name):
    """The split that a folder of this name is; None for any other folder."""
    for split, words in SPLIT_FOLDERS.items():
        if re.match(rf"({words})(?![a-z])", name, re.IGNORECASE):
            return split
    return None


def _has_configs(readme):
    return readme.is_file() and re.search(r"^configs:", readme.read_text(errors="replace"), re.MULTILINE) is not None


def _scan(root):
    """The folders that hold images, as tuples of names below `root`; the number of images and of containers; what
    `datasets` does not load: the endings of our formats that it does not know, and links to folders; and whether there
    are metadata."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from PIL import Image

    known = {ending.lower() for ending in ImageFolder.EXTENSIONS}
    extensions = {ending for ending, format in Image.registered_extensions().items() if format in FORMATS} | known
    extensions -= CONTAINERS
    places, images, containers, left_out, linked, has_metadata = set(), 0, 0, [], set(), False
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith((".", "__"))]  # as `datasets` skips them
        endings = [os.path.splitext(name)[1].lower() for name in files if not name.startswith((".", "metadata."))]
        count = sum(ending in extensions for ending in endings)
        if count:
            places.add(Path(folder).relative_to(root).parts)
        images += count
        containers += sum(ending in CONTAINERS for ending in endings)
        has_metadata |= any(name.startswith("metadata.") for name in files)
        here = Path(folder)
        if here != root and (here.is_symlink() or here.parent in linked):
            linked.add(here)
        left_out += [
            str((here / name).relative_to(root))
            for name in files
            if (ending := os.path.splitext(name)[1].lower()) in extensions and (here in linked or ending not in known)
        ]
    return places, images, containers, sorted(left_out), has_metadata
