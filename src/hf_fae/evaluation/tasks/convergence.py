"""How fast a training converges: EP-FID@k, the epochs until the FID of unguided samples is at most k (RAEv2)."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ...utils.digests import hash_file
from ..reports.report import Evaluation
from ..resumable import check_settings, process_state, without_paths


__all__ = ["ConvergenceArguments", "epochs_to_reach", "evaluate_convergence"]

UNGUIDED = ("guidance_scale", "internal_guidance_scale")
OF_A_MODEL = ("model", "batch_size", "device", "dtype")  # settings in which the evaluations may differ


@dataclass
class ConvergenceArguments:
    """The evaluations of a training, and the distance to reach."""

    reports: list[str] = field(
        metadata={"help": "EPOCHS=FOLDER of each evaluation: of `generation`, without guidance, one protocol for all."}
    )
    output_dir: str = field(metadata={"help": "Folder of the report."})
    threshold: float = field(default=2.0, metadata={"help": "k: the distance to reach."})
    metric: str = field(default="fid", metadata={"help": "Metric of the reports, lower is better."})

    def __post_init__(self):
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold}")


def evaluate_convergence(args: ConvergenceArguments) -> Evaluation | None:
    """EP-FID@k from the reports of a training's evaluations.

    It is the smallest evaluated number of epochs, too large by up to the spacing of the evaluations, which the report
    states.

    Returns:
        The result on the main process, whose report is written to `output_dir`; None on the others.

    Raises:
        ValueError: an invalid argument, a report that is missing, guided or of another protocol, or none that reaches
            the threshold; before anything is written.
    """
    reports = dict(_read_report(text, args.metric) for text in args.reports)
    if len(reports) < len(args.reports):
        raise ValueError(f"reports must have different epochs, got {', '.join(args.reports)}")
    protocols = [without_paths(_protocol(report)) for _, report in reports.values()]
    for (folder, _), protocol in zip(reports.values(), protocols):
        if changed := sorted(key for key in protocols[0] if protocol.get(key) != protocols[0][key]):
            raise ValueError(
                f"reports must have one protocol, got {changed[0]} {protocol.get(changed[0])!r} in {folder!r} and "
                f"{protocols[0][changed[0]]!r} in {next(iter(reports.values()))[0]!r}"
            )
    values = {epochs: report["metrics"][args.metric] for epochs, (_, report) in sorted(reports.items())}
    reached = epochs_to_reach(values, args.threshold)
    if reached is None:
        best = min(values, key=values.get)
        raise ValueError(
            f"threshold must be reached by a report, got {args.threshold:g}: the lowest {args.metric} is "
            f"{values[best]:g}, after {best:g} epochs"
        )
    _, report = reports[reached]
    hashes = {f"{epochs:g}": hash_file(Path(folder, "report.json")) for epochs, (folder, _) in sorted(reports.items())}
    settings = {**_protocol(report), "model": report["settings"]["model"], "metric": args.metric}
    settings |= {"threshold": args.threshold, "epochs": ", ".join(hashes), "reports": hashes}
    check_settings(args.output_dir, {"task": "convergence", **settings})
    if not process_state().is_main_process:
        return None
    name, details = f"ep_{args.metric}@{args.threshold:g}", {"values": {f"{key:g}": v for key, v in values.items()}}
    result = Evaluation(
        "convergence", {name: reached}, settings, dataset=report["dataset"], split=report["split"], details=details
    )
    result.save(args.output_dir)
    return result


def epochs_to_reach(values: dict[float, float], threshold: float) -> float | None:
    """The smallest key of epochs -> distance whose distance is at most the threshold; None if there is none."""
    return min((epochs for epochs, value in values.items() if value <= threshold), default=None)


def _read_report(text, metric):
    """Epochs, and the folder and report of an EPOCHS=FOLDER."""
    epochs, separator, folder = text.partition("=")
    try:
        epochs = float(epochs)
        report = json.loads(Path(folder, "report.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"reports must be EPOCHS=FOLDER of finished evaluations, got {text!r}: {error}") from error
    if report["task"] != "generation" or metric not in report["metrics"]:
        raise ValueError(f"reports must be of generation with the metric {metric}, got {report['task']} in {folder!r}")
    for name in UNGUIDED:
        guidance = report["settings"].get(name) or {}
        scales = [scale for _, _, scale in guidance.get("intervals", ())] + [guidance.get("scale", 1)]
        if any(scale != 1 for scale in scales) or guidance.get("weight", 0) != 0:
            raise ValueError(f"reports must be of samples without guidance, got {name} {guidance} in {folder!r}")
    return epochs, (folder, report)


def _protocol(report):
    return {name: value for name, value in report["settings"].items() if name not in OF_A_MODEL}
