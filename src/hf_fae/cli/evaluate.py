"""`hf-fae evaluate TASK`: evaluation tasks by name, with arguments from flags and a YAML file."""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING

from .verbosity import quieten_libraries


if TYPE_CHECKING:
    from ..evaluation.reports.report import Evaluation


__all__ = ["TASKS", "evaluate", "run"]

# Task -> its module in `evaluation/tasks`, which has `evaluate_TASK` of one or two dataclasses, and what it measures.
TASKS = {
    "generation": (
        "generation",
        "samples of a pipeline: gFID, sFID, IS, KID, precision, recall, FDr6, MIND6, CLIP score",
    ),
    "reconstruction": (
        "reconstruction",
        "reconstructions of a tokenizer: rFID, PSNR, SSIM, LPIPS, feature cosine, iFID",
    ),
    "probe": (
        "probe",
        "classification from features, reconstructed features and latents: k-NN, linear probe, the encoder's own head",
    ),
    "retrieval": ("retrieval", "image-text retrieval, both ways: recall at 1, 5 and 10"),
    "matching": ("matching", "patch similarity within images and patch matches between images, with plots"),
    "convergence": ("convergence", "epochs of a training until a FID is reached (EP-FID), from its evaluations"),
    "latents": (
        "latent_analysis",
        "how hard latents are to model: mixture modes, spectrum, statistics, denoising loss",
    ),
}


def run(argv: list[str]) -> None:
    """Run a task from its command line, or list the tasks."""
    task, *arguments = argv or ["--help"]
    if task in ("-h", "--help"):
        width = max(map(len, TASKS))
        print("usage: hf-fae evaluate TASK --model PATH_OR_ID --output_dir FOLDER ... (TASK --help lists all flags)\n")
        print("\n".join(f"  {task:{width}}  {summary}" for task, (_, summary) in TASKS.items()))
        return
    quieten_libraries()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"hf-fae: warning: {message}", file=sys.stderr)
        evaluate(task, arguments)


def evaluate(task: str, argv: list[str]) -> "Evaluation | None":
    """Run a task with its command-line arguments and print its protocol and, as a table, its metrics.

    Returns:
        The result on the main process, None on the others.

    Raises:
        ValueError: an unknown task, or arguments that do not fit.
        SystemExit: unknown or missing arguments, or values of the wrong type (argparse's message).
    """
    if task not in TASKS:
        raise ValueError(f"TASK must be one of {', '.join(TASKS)}, got {task!r}")
    from ..utils.parsing import parse_arguments

    name, summary = TASKS[task]
    module = import_module(f"hf_fae.evaluation.tasks.{name}")
    evaluate_task: Callable = getattr(module, f"evaluate_{task}")
    arguments = [parameter.annotation for parameter in signature(evaluate_task).parameters.values()]
    options = {"argv": argv, "description": summary, "prog": f"hf-fae evaluate {task}"}
    *parsed, _ = parse_arguments(*arguments, **options)
    result = evaluate_task(*parsed)
    if result is not None:
        print(f"protocol: {result.protocol}")
        width = max(len(name) for name in result.metrics)
        for name, value in result.metrics.items():
            print(f"{name:{width}}  {value:.6g}")
        print(f"wrote {parsed[0].output_dir}/report.json")
    return result
