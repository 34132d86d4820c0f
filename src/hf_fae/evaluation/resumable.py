"""Resumable results for many numbered images: computed in parts, by any number of processes, each part kept on disk.

A part holds the same images whichever process computes it, and parts are read in order: results depend neither on the
number of processes nor on interruptions.
"""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..utils.atomic import atomic_write
from ..utils.digests import commit_with_digest, find_damage
from ..utils.locks import lock_folder
from ..utils.processes import on_main_process
from ..utils.stopping import StopSignals
from .options import CHUNK


__all__ = ["Parts", "check_settings", "process_state", "without_paths"]

logger = logging.getLogger(__name__)


def process_state():
    """accelerate's `PartialState`: this process, their number, and the device.

    Several processes on CPUs are recognised by the environment of `accelerate launch --cpu`.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


class Parts:
    """Tensors with one row per image, in one file per part.

    Args:
        folder: created if need be; existing parts are kept.
        count: total number of images.
        batch_size: images per batch. A part has as many, rounded up to a multiple of `CHUNK`, so that extractors see
            the same images together for any batch size.
    """

    def __init__(self, folder: str | Path, count: int, batch_size: int):
        self.folder, self.count = Path(folder), count
        self.part_size = -(-batch_size // CHUNK) * CHUNK

    def compute(self, make_part: Callable[[range], dict[str, torch.Tensor]], description: str) -> None:
        """Compute the missing parts, distributed over the processes of `accelerate launch`.

        Args:
            make_part: numbers of images -> tensors, one row for each image or for some of them.
            description: of the progress bar.

        Raises:
            SystemExit: a process received a signal; each has finished its current part.
            ValueError: another run computes the parts of this folder, or it cannot be written.
        """
        state, self._lock = process_state(), None
        missing = on_main_process(state.is_main_process, self._lock_and_list)
        try:
            self._compute(missing, make_part, description)
            state.wait_for_everyone()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _compute(self, missing, make_part, description):
        """Write the parts of this process; a signal ends all processes after their current one."""
        from tqdm import tqdm

        state = process_state()
        mine = missing[state.process_index :: state.num_processes]
        is_main, done = state.is_main_process, self.count - sum(len(self._images(start)) for start in mine)
        bar = tqdm(total=self.count, initial=done, desc=description, unit="image", disable=not is_main)
        with bar as progress, StopSignals("the current part", announce=is_main) as signals:
            for start in mine:
                path = self._path(start)
                tensors = {name: values.contiguous() for name, values in make_part(self._images(start)).items()}
                save_file(tensors, path.with_suffix(".part"))
                commit_with_digest(path.with_suffix(".part"), path)
                progress.update(len(self._images(start)))
                signals.check()
            if len(mine) < len(missing[:: state.num_processes]):  # the others have one more
                signals.check()

    def _lock_and_list(self):
        """The parts that are missing or corrupt."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir {str(self.folder)!r} cannot be written: {error.strerror}") from error
        self._lock = lock_folder(self.folder)
        starts = range(0, self.count, self.part_size)
        damages = {start: find_damage(self._path(start)) for start in starts if self._path(start).exists()}
        if corrupt := [damage for damage in damages.values() if damage]:
            logger.warning("%s: computed again, as they are corrupt: %s", self.folder, "; ".join(corrupt))
        return [start for start in starts if damages.get(start, "missing")]

    def names(self) -> list[str]:
        """Names of the tensors."""
        with safe_open(self._path(0), "pt") as file:
            return sorted(file.keys())

    def iterate(self, name: str) -> Iterator[torch.Tensor]:
        """One tensor, part by part in the order of the images; one part is in memory at a time."""
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
    """Create the folder of a resumable run, or check that it holds the same run.

    Paths are ignored: models, files and images are compared by their hashes.

    Raises:
        ValueError: the folder holds a run with other settings or other files, or cannot be written.
    """
    state = process_state()
    path, part = Path(folder, "settings.json"), Path(folder, "settings.part")
    settings = json.loads(json.dumps(settings))
    try:
        before = json.loads(path.read_text()) if path.exists() else None
        others = before is None and path.parent.exists() and any(other != part for other in path.parent.iterdir())
    except OSError as error:
        raise ValueError(f"output_dir {str(folder)!r} cannot be used: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"output_dir {str(folder)!r} cannot be resumed, as its settings.json is corrupt: delete the folder, or "
            "pass another output_dir"
        ) from error
    if before is not None and not isinstance(before, dict):
        raise ValueError(f"output_dir {str(folder)!r} cannot be resumed, as its settings.json holds no settings")
    if before is not None:
        one, other = without_paths(before), without_paths(settings)
        if changed := sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)):
            key = changed[0]
            raise ValueError(
                f"output_dir {str(folder)!r} holds an evaluation with another {key}, {before.get(key)!r}, "
                f"got {settings.get(key)!r}: use another output_dir"
            )
    if others:
        raise ValueError(f"output_dir must be new, empty or that of an evaluation, got {str(folder)!r}")
    state.wait_for_everyone()  # all processes have checked before anything is written
    if state.is_main_process:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise ValueError(f"output_dir {str(folder)!r} cannot be written: {error}") from error
    state.wait_for_everyone()


def without_paths(settings):
    """Nested settings without the paths of things that a hash identifies."""
    if not isinstance(settings, dict):
        return settings
    hashed = settings.keys() & {"sha256", "fingerprint", "revision"}
    paths = ("path", "dataset", "file") if hashed else ()
    return {key: without_paths(value) for key, value in settings.items() if key not in paths}
