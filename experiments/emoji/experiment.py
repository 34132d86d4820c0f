"""What the experiments over seeds share: arguments, resumable trainings and evaluations, and tables."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from common import find_sources, run, run_cli, to_flags
from datasets import load_dataset

from hf_fae.data.decoding import center_crop, decode_image
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.utils.atomic import atomic_write


__all__ = [
    "ENCODER",
    "cache_latents",
    "evaluate",
    "evaluate_fid",
    "list_metrics",
    "parse",
    "repeat",
    "shrink",
    "spread",
    "train",
    "train_stages",
    "validation_images",
]

ENCODER = "{encoder}"  # in settings: the encoder of the command line
# Script -> its flag for the previous stage; and scripts whose first stage has a frozen encoder.
SOURCES = {"train_pixel_decoder.py": "fae"}
SOURCES |= dict.fromkeys(("train_detok.py", "train_maetok.py", "train_drorae.py"), "tokenizer")
ENCODED = ("train_fae.py", "train_drorae.py")


def parse(description: str, output: str, argv: list[str] | None) -> argparse.Namespace:
    """The command line; `encoder` and `data` default to the assets."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of all runs")
    parser.add_argument("--encoder", help="DINOv2-small: a folder or a Hub id (default: the assets, else the Hub)")
    parser.add_argument("--data", help="Fluent Emoji: a folder or a Hub id (default: the assets)")
    parser.add_argument("--judge", help="EfficientNet-Lite0, for fid_effnet of samples (default: the assets)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument(
        "--flags",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: further flags for all trainings",
    )
    args = parser.parse_args(argv)
    args.encoder, args.data = find_sources(args.encoder, args.data)
    return args


def shrink(data: str, size: int, folder: Path) -> str:
    """A copy of a data set with images of the training size, which saves the decoding of larger ones."""
    for split, rows in load_dataset(data).items():
        path = folder / f"{split}-00000-of-00001.parquet"
        if not path.exists():
            rows = rows.map(
                lambda row: {"image": center_crop(decode_image(row["image"]), size)},
                features=rows.features,
                keep_in_memory=True,
            )
            folder.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    return str(folder)


def validation_images(data: str, size: int, count: int | None = None) -> torch.Tensor:
    """Images (N, 3, size, size) of the validation split; at most `count`, evenly spaced."""
    data = ImageData(DataArguments(data, resolution=size, max_validation_samples=10**6))
    images = torch.cat([batch["pixel_values"] for batch in data.validation_batches(32)])
    if count is None:
        return images
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).long()]


def train(script: str, config: str, folder: Path, settings: dict, flags: list[str]) -> None:
    """Train in a process of its own; `flags` override `settings`."""
    run(script, config, folder, [*to_flags(settings), *flags])


def train_stages(folder: Path, stages: list[tuple[str, str, dict]], args: argparse.Namespace) -> Path:
    """The folder of a tokenizer, trained stage by stage.

    Args:
        stages: script, config and settings of each; the first one's frozen encoder is that of the command line.
    """
    for number, (script, config, settings) in enumerate(stages):
        settings = {key: args.encoder if value == ENCODER else value for key, value in settings.items()}
        settings["dataset_name"] = args.data
        if number > 0:
            settings[SOURCES[script]] = folder / f"stage-{number}"
        elif script in ENCODED:
            settings["image_encoder"] = args.encoder
        train(script, config, folder / f"stage-{number + 1}", settings, args.flags)
    return folder / f"stage-{len(stages)}"


def cache_latents(vae: Path, folder: Path, data: str, resolution: int) -> None:
    """Cache the latents of all images and of their mirror images, with subgroups as classes."""
    settings = {"dataset_name": data, "vae": vae, "resolution": resolution}
    train("cache_latents.py", "demo_latents.yaml", folder, settings, [])


def evaluate(task: str, folder: Path, settings: dict) -> dict[str, float]:
    """The metrics of `hf-fae evaluate`; an existing report is read."""
    if not (folder / "report.json").exists():
        run_cli(["evaluate", task, *to_flags({"output_dir": folder, **settings})])
    return json.loads((folder / "report.json").read_text())["metrics"]


def evaluate_fid(model: Path, args: argparse.Namespace, judge: str, num_samples: int) -> float:
    """`fid_effnet` of samples of a class-conditional pipeline, against the training images."""
    settings = {"model": model, "dataset_name": args.data, "split": "train", "label_column": "subgroup"}
    settings |= {"num_samples": num_samples, "extractors": [f"effnet={judge}"], "metrics": ["fid"]}
    settings["reference_cache"] = args.output / "reference"
    return evaluate("generation", model.with_name(f"{model.name}-samples"), settings)["fid_effnet"]


def repeat(args: argparse.Namespace, once: Callable[[Path, int], dict], table: Callable[[list[dict]], str]) -> None:
    """Run an experiment once per seed, keep the results, and write the table so far to `results.md` after each.

    Args:
        once: (folder, seed) -> {run: {metric: number}}.
        table: results of all seeds -> Markdown.
    """
    results = []
    for seed in range(args.seeds):
        folder = args.output / f"seed-{seed}"
        if not (folder / "results.json").exists():
            atomic_write(folder / "results.json", json.dumps(once(folder, seed), indent=2))
        results.append(json.loads((folder / "results.json").read_text()))
        text = table(results)
        (args.output / "results.md").write_text(text + "\n")
    print(f"\n{text}")


def list_metrics(titles: dict[str, str], metrics: dict[str, str], results: list[dict]) -> list[str]:
    """Lines of a Markdown table: mean and standard deviation over the seeds, per run and metric.

    Args:
        titles, metrics: run or metric -> its name in the table.
    """
    lines = ["| | " + " | ".join(metrics.values()) + " |", "|---" * (1 + len(metrics)) + "|"]
    for name, title in titles.items():
        cells = [spread([result[name][metric] for result in results]) for metric in metrics]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def spread(values: list[float]) -> str:
    """Mean and standard deviation, with four decimals; with one from 100 on."""
    digits = 1 if mean(values) >= 100 else 4
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
