"""How `datasets` opens what `dataset_name` names: a Hub id, a folder of images or data files, a file, a saved set."""

import glob
import re
from pathlib import Path

from .splits import find_splits, image_places


__all__ = ["load_split", "split_names"]

BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".tar": "webdataset",
}
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves


def load_split(dataset_name: str, config: str | None, split: str, streaming: bool, has_labels: bool):
    """The rows of a split or slice, a `datasets.Dataset` or an `IterableDataset`.

    Args:
        has_labels: a folder of images has a column "label", the names of the folders that hold them.

    Raises:
        ValueError: a file of another kind, folders that name neither splits nor classes, or no such split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if _is_saved(dataset_name):
        return _load_saved(dataset_name, split, streaming)
    try:
        return load_dataset(**_location(dataset_name, config, has_labels), split=split, streaming=streaming)
    except DatasetGenerationError as error:
        raise ValueError(f"{dataset_name!r} cannot be read by datasets: {error.__cause__ or error}") from error
    except ValueError as error:
        found = re.search(r"(?:Unknown split|Bad split:?) .*?\[(.*)\]", str(error))
        if found is None:
            raise
        names = found.group(1).replace("'", "")
        raise ValueError(
            f"{dataset_name!r} has no split {split!r}, only {names}: add it, or take it from another one, as with "
            f"--train_split 'train[:90%]' --validation_split 'train[90%:]'"
        ) from error


def split_names(dataset_name: str, config: str | None) -> list[str]:
    """The names of the splits that `load_split` knows."""
    from datasets import get_dataset_split_names, load_from_disk

    if _is_saved(dataset_name):
        saved = load_from_disk(dataset_name)
        return list(saved) if isinstance(saved, dict) else ["train"]
    location = _location(dataset_name, config, has_labels=False)
    if "data_files" in location:
        files = location["data_files"]
        return list(files) if isinstance(files, dict) else ["train"]
    return get_dataset_split_names(dataset_name, config)


def _is_saved(dataset_name):
    return any((Path(dataset_name) / name).is_file() for name in SAVED)


def _load_saved(dataset_name, split, streaming):
    from datasets import load_from_disk

    saved = load_from_disk(dataset_name)
    splits = saved if isinstance(saved, dict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"a data set of save_to_disk has whole splits, {', '.join(splits)}, got {split!r}")
    return splits[split].to_iterable_dataset() if streaming else splits[split]


def _location(dataset_name, config, has_labels):
    """Arguments of `load_dataset`."""
    path = Path(dataset_name)
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise ValueError(
                f"dataset_name must be a Hub id, a folder (unpack archives), or a file of {', '.join(BUILDERS)}, "
                f"got {dataset_name!r}"
            )
        return {"path": BUILDERS[path.suffix.lower()], "data_files": glob.escape(str(path.absolute()))}
    splits = find_splits(dataset_name) if config is None else None
    if splits is None:
        if path.is_dir() and glob.has_magic(str(path)):
            raise ValueError(
                f"dataset_name must not have any of [ ] * ? in its path for data files, got {dataset_name!r}"
            )
        return {"path": dataset_name, "name": config}
    location = {"path": "imagefolder", "data_dir": dataset_name, "data_files": splits}
    if glob.has_magic(dataset_name):  # `datasets` reads the path of the folder as a pattern, too
        root = glob.escape(str(path.absolute()))
        location = {
            "path": "imagefolder",
            "data_files": {name: [f"{root}/{pattern}" for pattern in patterns] for name, patterns in splits.items()},
        }
    if has_labels and not any(path.rglob("metadata.*")):
        _check_class_folders(dataset_name, image_places(dataset_name, splits))
        location["drop_labels"] = False
    return location


def _check_class_folders(dataset_name, places):
    """Refuse folders whose images have no class, or a class that depends on where one looks.

    Args:
        places: the folders that hold images, below those of their splits, as tuples of names.
    """
    names = ["/".join(place) or "." for place in sorted(places)]
    if () in places:
        beside = f", beside the folders {', '.join(names[1:4])}" if len(names) > 1 else ", without class folders"
        raise ValueError(
            f"label_column 'label' is the folder of an image, but {dataset_name!r} has images at its top{beside}: "
            "put each image into the folder of its class, or leave out label_column"
        )
    if len({len(place) for place in places}) > 1:
        raise ValueError(
            f"label_column 'label' is the folder of an image, but the folders of {dataset_name!r} differ in depth, "
            f"{', '.join(names[:4])}: move all images to one depth, or leave out label_column"
        )
