"""What the experiments on emoji share: arguments, runs and evaluations that go on where they were, and tables."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from datasets import load_dataset
from demo import ROOT, find, find_sources, run, run_cli

from hf_fae.data.decoding import center_crop, decode_image
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.utils.atomic import atomic_write


__all__ = [
    "cache_latents",
    "evaluate",
    "evaluate_fid",
    "find_judge",
    "list_metrics",
    "parse",
    "repeat",
    "shrink",
    "spread",
    "to_flags",
    "train",
    "validation_pictures",
]


def parse(description: str, output: str, argv: list[str] | None) -> argparse.Namespace:
    """The command line, with `encoder` and `data` as they have been found."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of all runs")
    parser.add_argument("--encoder", help="DINOv2-small: a folder or a Hub id (default: the assets, else the Hub)")
    parser.add_argument("--data", help="Fluent Emoji: a folder or a Hub id (default: the assets)")
    parser.add_argument("--judge", help="EfficientNet-Lite0, where samples are judged (default: the assets)")
    parser.add_argument("--seeds", type=int, default=3, help="how many times, from seed 0")
    parser.add_argument(
        "--flags",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: further flags of the trainings, for all runs",
    )
    args = parser.parse_args(argv)
    args.encoder, args.data = find_sources(args.encoder, args.data)
    return args


def find_judge(judge: str | None) -> str:
    """EfficientNet-Lite0: what is named, else the assets.

    Raises:
        SystemExit: there is none.
    """
    assets = Path(os.environ.get("HF_FAE_ASSETS", ROOT.parent / "shared" / "assets"))
    if found := judge or find(assets / "efficientnet-lite0"):
        return found
    raise SystemExit(
        "--judge must name EfficientNet-Lite0, or HF_FAE_ASSETS the folder that holds efficientnet-lite0/"
    )


def shrink(data: str, size: int, folder: Path) -> str:
    """A data set whose pictures have the size that trainings ask for, so that none has to decode larger ones."""
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


def validation_pictures(data: str, size: int, count: int | None = None) -> torch.Tensor:
    """(N, 3, size, size) of the validation split; `count` of them, from all of its parts, if there are more."""
    pictures = ImageData(DataArguments(data, resolution=size, max_validation_samples=10**6))
    images = torch.cat([batch["pixel_values"] for batch in pictures.validation_batches(32)])
    if count is None:
        return images
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).long()]


def to_flags(settings: dict) -> list[str]:
    """Settings as flags; a list gives several values."""
    return [
        text
        for key, value in settings.items()
        for text in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]


def train(script: str, config: str, folder: Path, settings: dict, flags: list[str]) -> None:
    """A training, in a process of its own; `flags` win."""
    run(script, config, folder, *to_flags(settings), *flags)


def cache_latents(vae: Path, folder: Path, data: str, resolution: int) -> None:
    """The latents of all pictures and of their mirror images, with their subgroups, for generators to learn from."""
    settings = {"dataset_name": data, "vae": vae, "resolution": resolution}
    train("cache_latents.py", "demo_latents.yaml", folder, settings, [])


def evaluate(task: str, folder: Path, settings: dict) -> dict[str, float]:
    """The metrics of `hf-fae evaluate`; a report that is there is read."""
    if not (folder / "report.json").exists():
        run_cli("evaluate", task, *to_flags({"output_dir": folder, **settings}))
    return json.loads((folder / "report.json").read_text())["metrics"]


def evaluate_fid(model: Path, args: argparse.Namespace, judge: str, num_samples: int) -> float:
    """`fid_effnet` of what a pipeline of subgroups draws, against the training pictures."""
    settings = {"model": model, "dataset_name": args.data, "split": "train", "label_column": "subgroup"}
    settings |= {"num_samples": num_samples, "extractors": [f"effnet={judge}"], "metrics": ["fid"]}
    settings["reference_cache"] = args.output / "reference"
    return evaluate("generation", model.with_name(f"{model.name}-samples"), settings)["fid_effnet"]


def repeat(args: argparse.Namespace, once: Callable[[Path, int], dict], table: Callable[[list[dict]], str]) -> None:
    """Everything once for each seed, whose results are kept; after each, the table so far, `results.md`.

    Args:
        once: folder and seed -> run -> metric -> number.
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
    """Lines of a Markdown table: of each run, mean and standard deviation of its metrics over the seeds.

    Args:
        titles, metrics: run or metric -> what it is in the table.
    """
    lines = ["| | " + " | ".join(metrics.values()) + " |", "|---" * (1 + len(metrics)) + "|"]
    for name, title in titles.items():
        cells = [spread([result[name][metric] for result in results]) for metric in metrics]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def spread(values: list[float]) -> str:
    """Mean and standard deviation, with four decimals, of numbers from 100 on with one."""
    digits = 1 if mean(values) >= 100 else 4
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
