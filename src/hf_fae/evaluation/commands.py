"""`hf-fae evaluate TASK`: tasks by their names, with arguments from flags and from a YAML file."""

from collections.abc import Callable
from importlib import import_module

from ..utils.parsing import parse_arguments
from .inputs.numbered_images import PictureArguments
from .reports.report import Evaluation


__all__ = ["TASKS", "evaluate"]

# Task -> what it measures; in `tasks/` a module of that name has `evaluate_TASK` and its dataclass of arguments.
TASKS = {
    "generation": "pictures that a pipeline draws: gFID, sFID, IS, KID, precision, recall, CLIP score",
    "reconstruction": "pictures that a tokenizer gives back: rFID, PSNR, SSIM, LPIPS, feature cosine",
    "probe": "classes from features, reconstructed features and latents: k-NN, linear probe, the encoder's own head",
    "retrieval": "captions and pictures find each other: recall at 1, 5 and 10",
    "matching": "pictures of patch similarity and of patches matched between pictures",
    "latents": "how hard latents are to model: mixture modes, spectrum, statistics, diffusion loss",
}


def evaluate(task: str, argv: list[str]) -> Evaluation | None:
    """Run a task with its command-line arguments; what it measures is printed as a table.

    Raises:
        ValueError: no such task, or arguments that do not fit.
        SystemExit: unknown or missing arguments, or values of the wrong type (argparse's message).
    """
    if task not in TASKS:
        raise ValueError(f"TASK must be one of {', '.join(TASKS)}, got {task!r}")
    module = import_module(f".tasks.{task}", __package__)
    run: Callable = getattr(module, f"evaluate_{task}")
    arguments = getattr(module, f"{task.capitalize()}Arguments")
    options = {"argv": argv, "description": TASKS[task], "prog": f"hf-fae evaluate {task}"}
    *parsed, _ = parse_arguments(arguments, PictureArguments, **options)
    result = run(*parsed)
    if result is not None:
        width = max(len(name) for name in result.metrics)
        for name, value in result.metrics.items():
            print(f"{name:{width}}  {value:.6g}")
        print(f"wrote {parsed[0].output_dir}/report.json")
    return result
