"""Which files of a local folder of images belong to which split.

`datasets` looks for words such as "train" and "test" in all file and folder names and keeps only matching files: one
image called `steam-train-1.png` would be the whole train split. Here only folders at one level can be splits.
"""

import glob
import os
import re
from pathlib import Path


__all__ = ["find_splits"]

SPLIT_FOLDERS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|evaluation|eval",
}
CONTAINERS = {".arrow", ".gz", ".parquet", ".tar", ".tgz", ".zip"}


def find_splits(folder: str) -> dict[str, list[str]] | None:
    """Glob patterns of the images of each split.

    If all top-level folders are named like splits (`train/`, `val/`, `test_images/`), they are the splits; images next
    to them belong to none. A single folder around them does not count as a level. Otherwise every image is a training
    image, whatever its own name or that of its class.

    Returns:
        Split -> patterns relative to `folder`. None where `datasets` decides: `folder` is no local folder, consists of
        data files (parquet, tar, ...), or its README.md declares the splits.

    Raises:
        ValueError: some folders are named like splits, including train, and others are not.
    """
    root = Path(folder)
    if not root.is_dir() or _has_configs(root / "README.md"):
        return None
    places, images, containers = _scan(root)
    if containers >= images:
        return None
    above: tuple[str, ...] = ()
    while len({place[:1] for place in places}) == 1 and () not in places:
        name = next(iter(places))[0]
        if _split_of(name):
            break
        above, places = (*above, name), {place[1:] for place in places}
    names = sorted({place[0] for place in places if place})
    splits = {name: _split_of(name) for name in names if _split_of(name)}
    if splits and len(splits) == len(names):
        patterns: dict[str, list[str]] = {}
        for name, split in splits.items():
            patterns.setdefault(split, []).append("/".join([*map(glob.escape, (*above, name)), "**"]))
        return patterns
    if "train" in splits.values() and len(set(splits.values())) > 1:
        others = [name for name in names if name not in splits]
        raise ValueError(
            f"dataset_name {folder!r} has folders named like splits, {', '.join(splits)}, and others, "
            f"{', '.join(others[:5])}{', ...' * (len(others) > 5)}: remove the others, or put all into one train/"
        )
    return {"train": ["**"]}


def _split_of(name):
    for split, words in SPLIT_FOLDERS.items():
        if re.match(rf"({words})(?![a-z])", name, re.IGNORECASE):
            return split
    return None


def _has_configs(readme):
    return readme.is_file() and re.search(r"^configs:", readme.read_text(errors="replace"), re.MULTILINE) is not None


def _scan(root):
    """The folders that hold images, as tuples of names below `root`; the number of images and of containers."""
    from PIL import Image

    extensions = Image.registered_extensions().keys() - CONTAINERS
    places, images, containers = set(), 0, 0
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith((".", "__"))]  # as `datasets` skips them
        endings = [os.path.splitext(name)[1].lower() for name in files if not name.startswith((".", "metadata."))]
        here = sum(ending in extensions for ending in endings)
        if here:
            places.add(Path(folder).relative_to(root).parts)
        images += here
        containers += sum(ending in CONTAINERS for ending in endings)
    return places, images, containers
