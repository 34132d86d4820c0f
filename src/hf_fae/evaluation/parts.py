"""Results for many numbered images: in parts, by any number of processes, each part kept when the run is killed.

A part holds the same images whichever process computes it, and the parts are read in their order: what is made of them
does not depend on the number of processes, nor on how often the run was interrupted.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..utils.atomic import atomic_write
from .inputs.extractors import CHUNK


__all__ = ["Parts", "check_settings", "process_state", "without_places"]


def process_state():
    """accelerate's `PartialState`: which process this is, among how many, and its device.

    On CPUs alone several processes are known by the environment that `accelerate launch --cpu` makes.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


class Parts:
    """Tensors with a row for each of `count` images, in files of a folder.

    Args:
        folder: made if need be; parts that are there are kept.
        count: images in all.
        batch_size: images that are worked on at a time. A part has so many, rounded up to a multiple of `CHUNK`, so
            that extractors see the same pictures together for any batch size.
    """

    def __init__(self, folder: str | Path, count: int, batch_size: int):
        self.folder, self.count = Path(folder), count
        self.part_size = -(-batch_size // CHUNK) * CHUNK

    def compute(self, make_part: Callable[[range], dict[str, torch.Tensor]], description: str) -> None:
        """Compute what is missing, shared among the processes of `accelerate launch`.

        Args:
            make_part: numbers of images -> tensors, a row for each image or for some of them.
            description: of the progress bar.
        """
        from tqdm import tqdm

        state = process_state()
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [start for start in range(0, self.count, self.part_size) if not self._path(start).exists()]
        state.wait_for_everyone()  # all have the same list before anyone shortens it
        mine = missing[state.process_index :: state.num_processes]
        done = self.count - sum(len(self._images(start)) for start in mine)
        with tqdm(
            total=self.count, initial=done, desc=description, unit="image", disable=not state.is_main_process
        ) as progress:
            for start in mine:
                path = self._path(start)
                tensors = {name: values.contiguous() for name, values in make_part(self._images(start)).items()}
                save_file(tensors, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
                progress.update(len(self._images(start)))
        state.wait_for_everyone()

    def names(self) -> list[str]:
        """Of the tensors."""
        with safe_open(self._path(0), "pt") as file:
            return sorted(file.keys())

    def iterate(self, name: str) -> Iterator[torch.Tensor]:
        """One tensor part by part, in the order of the images; nothing else is in memory."""
        for start in range(0, self.count, self.part_size):
            with safe_open(self._path(start), "pt") as file:
                yield file.get_tensor(name)

    def stack(self, name: str) -> torch.Tensor:
        """One tensor of all images."""
        return torch.cat(list(self.iterate(name)))

    def _images(self, start):
        return range(start, min(start + self.part_size, self.count))

    def _path(self, start):
        return self.folder / f"{start:09d}.safetensors"


def check_settings(folder: str | Path, settings: dict) -> None:
    """Make the folder of a run that can be continued, or see that it is the same run that is to be continued.

    Where things lie does not count: models, files and pictures are known by their hashes.

    Raises:
        ValueError: the folder holds a run with other settings, or something else, or cannot be written.
    """
    state = process_state()
    path, part = Path(folder, "settings.json"), Path(folder, "settings.part")
    settings = json.loads(json.dumps(settings))
    try:
        before = json.loads(path.read_text()) if path.exists() else None
        others = before is None and path.parent.exists() and any(other != part for other in path.parent.iterdir())
    except OSError as error:
        raise ValueError(f"output_dir {str(folder)!r} cannot be used: {error}") from error
    if before is not None:
        one, other = without_places(before), without_places(settings)
        if changed := sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)):
            key = changed[0]
            raise ValueError(
                f"output_dir {str(folder)!r} holds an evaluation with another {key}, {before.get(key)!r}, "
                f"got {settings.get(key)!r}: take another output_dir"
            )
    if others:
        raise ValueError(f"output_dir must be new, empty or that of an evaluation, got {str(folder)!r}")
    state.wait_for_everyone()  # all have looked before anything is written
    if state.is_main_process:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise ValueError(f"output_dir {str(folder)!r} cannot be written: {error}") from error
    state.wait_for_everyone()


def without_places(settings):
    """Nested settings without the places of what has a hash beside them, which is the same wherever it lies."""
    if not isinstance(settings, dict):
        return settings
    hashed = settings.keys() & {"sha256", "fingerprint", "revision"}
    places = ("path", "dataset", "file") if hashed else ()
    return {key: without_places(value) for key, value in settings.items() if key not in places}
