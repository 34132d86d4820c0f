"""The log of a run: `log.jsonl`, trackers, and validation images."""

import json
import logging
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..images import save_png
from ..utils.atomic import atomic_write


__all__ = ["RunLog"]

logger = logging.getLogger(__name__)


class RunLog:
    """Writes numbers and images on the main process; a dry run prints the numbers and writes nothing.

    Args:
        output_dir: folder of the run.
        accelerator: with its trackers.
        dry_run: see above.
    """

    def __init__(self, output_dir: Path, accelerator: Accelerator, dry_run: bool = False):
        self.output_dir, self.accelerator, self.dry_run = output_dir, accelerator, dry_run
        self.path = output_dir / "log.jsonl"

    def print(self, message: str) -> None:
        """Print on the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message)

    def write(self, entry: dict, step: int, images_seen: int) -> None:
        """Append a line, and send its numbers to the trackers."""
        if self.dry_run:
            self.print(json.dumps(entry))
        elif self.accelerator.is_main_process:
            with open(self.path, "a") as log:
                log.write(json.dumps({"step": step, "images": images_seen, **entry}) + "\n")
            self.accelerator.log({k: v for k, v in entry.items() if v is not None}, step=step)

    def truncate(self, step: int, drop_validation: bool = False) -> None:
        """Drop the lines that an interrupted run wrote after its checkpoint: they will be written again.

        Lines that cannot be read, which a power failure or a full disk leaves, are dropped with a warning.

        Args:
            step: of the checkpoint.
            drop_validation: also drop the validation of that step.
        """
        if not self.path.exists():
            return
        *lines, _ = self.path.read_bytes().split(b"\n")  # a kill may leave a part of the last line
        kept, unreadable = [], 0
        for line in lines:
            entry = _parse(line)
            unreadable += entry is None
            is_due = drop_validation and entry and any(name.startswith("validation/") for name in entry)
            if entry and (entry["step"] < step or (entry["step"] == step and not is_due)):
                kept.append(line.decode() + "\n")
        if unreadable:
            logger.warning("%s: %d corrupt lines were dropped", self.path, unreadable)
        atomic_write(self.path, "".join(kept))

    def save_images(self, images: dict, step: int) -> None:
        """Write PIL images to `validation/<name>-<step>.png`, and send them to the trackers."""
        if self.dry_run or not images or not self.accelerator.is_main_process:
            return
        folder = self.output_dir / "validation"
        folder.mkdir(exist_ok=True)
        for name, image in images.items():
            save_png(image, folder / f"{name}-{step:07d}.png")
            for tracker in self.accelerator.trackers:
                if tracker.name == "trackio":
                    import trackio

                    tracker.log({name: trackio.Image(image)}, step=step)
                else:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({name: np.asarray(image)[None]}, step=step, **layout)


def _parse(line):
    """The entry of a line of the log; None if it is corrupt."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):  # the latter from nested brackets
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
