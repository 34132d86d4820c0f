"""Which paths the rows of a data set may name: those of the data set itself."""

import os
import re

from .corrupt import EMPTY, UNSAFE, CorruptRow
from .image_files import shorten


__all__ = ["check_inside"]

HUB = "hf://datasets/"
# An image inside an archive or a compressed file of the data set, as `datasets` names it: zip://cat/0.png::PLACE.
# fsspec follows other chains, such as file:///etc/passwd::PLACE, to their first part.
INNER = re.compile(r"(zip|gzip|bz2|xz|zstd|lz4)://")


def check_inside(path: str | None, dataset_name: str) -> None:
    """Check that a path that a row of a data set names belongs to this data set.

    That is the folder, the folder of the file, or the Hub repository that `dataset_name` names, with the copies of
    them that `datasets` keeps. Local paths are compared as they are written: links inside a folder of images may lead
    anywhere, as whoever made the folder wanted.

    Args:
        dataset_name: a local folder or file, or a Hub id.

    Raises:
        CorruptRow: it does not. The rows of a data set shall not read a user's other files, or fetch URLs.
    """
    if path is None:
        raise CorruptRow(EMPTY, "there is neither an image nor the path of one")
    *inner, place = path.split("::")
    is_inside = all(INNER.match(part) for part in inner)
    if "://" in place:
        repository = re.escape(dataset_name.removeprefix(HUB))
        is_inside &= re.match(rf"{HUB}{repository}[@/]", place) is not None and ".." not in place.split("/")
    else:
        place = os.path.abspath(place)
        is_inside &= any(place == root or place.startswith(root.rstrip("/") + "/") for root in _roots(dataset_name))
    if not is_inside:
        shown = path if inner else place
        raise CorruptRow(UNSAFE, f"{shorten(shown)} is outside of the data set {dataset_name!r}")


def _roots(dataset_name):
    """The local folders of a data set, as written and with links resolved: `datasets` resolves those of a folder."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    own = os.path.dirname(os.path.abspath(dataset_name)) if os.path.isfile(dataset_name) else dataset_name
    snapshots = os.path.join(HF_HUB_CACHE, f"datasets--{dataset_name.removeprefix(HUB).replace('/', '--')}")
    folders = (own, snapshots, config.EXTRACTED_DATASETS_PATH)
    return {resolve(folder) for folder in folders for resolve in (os.path.abspath, os.path.realpath)}
