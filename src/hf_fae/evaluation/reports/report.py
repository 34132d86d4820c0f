"""The result of an evaluation: a JSON report with every setting, and entries for the Hub's leaderboards."""

import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ...cards import Result, write_eval_results
from ...utils.atomic import atomic_write


__all__ = ["Evaluation"]

# Settings that change a metric's meaning, in the order in which they are printed; `report.json` has all.
PROTOCOL = ("labels", "num_samples", "num_inference_steps", "guidance_scale", "internal_guidance_scale")
PROTOCOL += ("reference", "held_out", "pictures", "extractors", "epochs")
LIBRARIES = ["hf_fae", "torch", "diffusers", "transformers", "torchmetrics"]


@dataclass
class Evaluation:
    """The result of one evaluation.

    Attributes:
        task: as on the command line.
        metrics: name -> finite number.
        settings: everything that the metrics depend on, JSON-able.
        dataset, split: the data: Hub id, folder or file.
        details: further measurements, JSON-able: tables, curves, choices.
    """

    task: str
    metrics: dict[str, float]
    settings: dict
    dataset: str
    split: str | None = None
    details: dict | None = None

    @property
    def protocol(self) -> str:
        """What one needs to know to compare the metrics with others, in one line."""
        parts = [f"{self.dataset} {self.split}" if self.split else str(self.dataset)]
        for name in PROTOCOL:
            value = self.settings.get(name)
            if name == "extractors":
                value = ", ".join(value or ()) or None
            elif isinstance(value, dict):
                value = f"{value['count']} images" if "count" in value else json.dumps(value)
            if value is not None:
                parts.append(f"{name} {value}")
        return "; ".join(parts)

    def save(self, folder: str | Path) -> None:
        """Write `report.json` and, if the data set is on the Hub, `.eval_results/hf_fae.yaml`.

        Raises:
            ValueError: there are no metrics, or one is not finite.
        """
        folder = Path(folder)
        unusable = [f"{name} is {value}" for name, value in self.metrics.items() if not math.isfinite(value)]
        if unusable or not self.metrics:
            problem = unusable[0] if unusable else "there are no metrics"
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
    """Pairs ("model.sha256", value) of nested settings, without those that are None."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value
