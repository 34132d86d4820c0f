"""What a finished run publishes: its card, and the folder on the Hub."""

import sys

from ..cards import Result, TrainingRun, write_card
from ..hub import push_folder
from .arguments import LoopArguments


__all__ = ["publish", "training_run"]

# Of the settings, those that tell how a number of the validation came about.
PROTOCOL = ("resolution", "max_validation_samples", "validation_inference_steps", "mixed_precision")


def training_run(config: dict, step: int, images_seen: int, results: dict | None) -> TrainingRun:
    """What the card of a run tells.

    Args:
        config: all arguments of the run as plain values.
        step, images_seen: how long it trained.
        results: of its last validation; the numbers in it are measurements.
    """
    dataset = config.get("dataset_name")
    protocol = {name.replace("_", " "): config[name] for name in PROTOCOL if config.get(name) is not None}
    numbers = {name: value for name, value in (results or {}).items() if isinstance(value, (int, float))}
    split = config.get("validation_split")
    return TrainingRun(
        command=["accelerate", "launch", *sys.argv],
        config=config,
        datasets=[dataset] if dataset else [],
        step=step,
        images_seen=images_seen,
        results=[Result(name, value, dataset, split, protocol) for name, value in numbers.items() if dataset],
        base_model=config.get("pipeline"),
        license=config.get("license"),
    )


def publish(args: LoopArguments, run: TrainingRun) -> None:
    """Write the card into `output_dir` and, if `push_to_hub`, upload the folder as `hub_model_id`."""
    write_card(args.output_dir, run, repo_id=args.hub_model_id)
    if args.push_to_hub:
        message = f"Training: {run.step:,} steps"
        push_folder(args.output_dir, args.hub_model_id, private=args.hub_private_repo, commit_message=message)
