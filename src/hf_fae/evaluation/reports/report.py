"""What an evaluation leaves behind: a JSON report with every setting, and entries for the Hub's leaderboards."""

import hashlib
import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from ...cards import Result, write_eval_results
from ...utils.atomic import atomic_write
from ..options import EvaluationArguments


__all__ = ["Evaluation", "describe_run", "hash_file", "identify_model"]

LIBRARIES = ["hf_fae", "torch", "diffusers", "transformers", "torchmetrics"]


@dataclass
class Evaluation:
    """The result of one evaluation.

    Attributes:
        task: as on the command line.
        metrics: name -> number; NaN has no place here.
        settings: all that the numbers depend on, JSON-able.
        dataset, split: what they were measured on: Hub id, folder or file.
        details: what else was measured, JSON-able: tables, curves, choices.
    """

    task: str
    metrics: dict[str, float]
    settings: dict
    dataset: str
    split: str | None = None
    details: dict | None = None

    def save(self, folder: str | Path) -> None:
        """Write `report.json` and, where the data set is one of the Hub, `.eval_results/hf_fae.yaml`.

        Raises:
            ValueError: there are no metrics, or one is not finite.
        """
        folder = Path(folder)
        unusable = [f"{name} is {value}" for name, value in self.metrics.items() if not math.isfinite(value)]
        if unusable or not self.metrics:
            problem = unusable[0] if unusable else "there is nothing to measure"
            raise ValueError(f"{self.task} of model {self.settings['model']['path']!r} gives no result: {problem}")
        protocol = dict(_flatten({"task": self.task, **self.settings}))
        results = [Result(name, value, self.dataset, self.split, protocol) for name, value in self.metrics.items()]
        write_eval_results(folder, results)
        report = {
            "task": self.task,
            "metrics": self.metrics,
            "dataset": self.dataset,
            "split": self.split,
            "settings": self.settings,
            "details": self.details or {},
            "versions": {library: version(library) for library in LIBRARIES},
        }
        atomic_write(folder / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")


def _flatten(settings, prefix=""):
    """Pairs ("model.sha256", value) of nested settings; without those that are not in use."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def describe_run(args: EvaluationArguments, resolution: int, device: torch.device) -> dict:
    """The settings that all evaluations of a model have, JSON-able."""
    return {
        "model": identify_model(args.model),
        "encoder": identify_model(args.encoder) if getattr(args, "encoder", None) else None,
        "dtype": args.dtype,
        "device": device.type,
        "resolution": resolution,
        "batch_size": args.batch_size,
        "seed": args.seed,
    }


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def identify_model(path: str) -> dict[str, str]:
    """Which checkpoint this is: {"path", "revision"} of a Hub id that has been loaded, {"path", "sha256"} of a folder.

    The hash is of the names and contents of all configs and weights; checkpoints of the training are left out, and
    folders of evaluations.
    """
    if not Path(path).is_dir():
        files = [try_to_load_from_cache(path, name) for name in ("model_index.json", "config.json")]
        return {"path": path, "revision": next(Path(file).parent.name for file in files if isinstance(file, str))}
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        name = file.relative_to(path)
        if file.suffix not in (".json", ".safetensors") or name.parts[0].startswith(("checkpoint-", ".")):
            continue
        if not any(Path(path, folder, "settings.json").exists() for folder in name.parents[:-1]):
            digest.update(f"{name.as_posix()} {hash_file(file)}\n".encode())
    return {"path": path, "sha256": digest.hexdigest()}
