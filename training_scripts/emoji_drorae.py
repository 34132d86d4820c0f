"""Does a fusion of all layers help, and then a decoder that knows it? DRoRAE on Fluent Emoji at 128 px, three seeds.

    python training_scripts/emoji_drorae.py --output outputs/emoji-drorae

For every seed, by train_drorae.py with the configs `configs/emoji_drorae_phase*.yaml`: an RAE (phase 1), the fusion of
all twelve layers of DINOv2-small before its decoder (phase 2), and the decoder behind that (phase 3). Two controls
show what else could have helped: the RAE trained on for as long as phase 3, and phases 2 and 3 with an expert for the
last layer alone, as wide as the twelve together. `results.md` has the error on the validation split: the mean absolute
difference of pixels on the [0, 1] scale. A run that was stopped goes on where it was.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from demo import find_sources, last, run


# Run -> what it is in the table, its config, the run that it goes on from, and further settings.
WIDTH, LAYERS = 384, 12
RUNS = {
    "rae": ("RAE (phase 1)", 1, None, {}),
    "rae-longer": ("RAE, trained on for as long as phase 3", 1, "rae", {"max_train_steps": 400}),
    "fusion": ("all layers, phase 2", 2, "rae", {"expert_hidden_size": WIDTH}),
    "decoder": ("all layers, phase 3", 3, "fusion", {}),
    "last-fusion": (
        "last layer alone, phase 2",
        2,
        "rae",
        {"expert_hidden_size": WIDTH * LAYERS, "fusion_layers": 1},
    ),
    "last-decoder": ("last layer alone, phase 3", 3, "last-fusion", {}),
}
METRICS = {"reconstruction": "mean absolute error", "psnr": "PSNR in dB"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/emoji-drorae"), help="folder of all runs")
    parser.add_argument("--encoder", help="DINOv2-small: a folder or a Hub id (default: the assets, else the Hub)")
    parser.add_argument("--data", help="Fluent Emoji: a folder or a Hub id (default: the assets)")
    parser.add_argument("--seeds", type=int, default=3, help="how many times, from seed 0")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="last: further flags of train_drorae.py, for every run"
    )
    args = parser.parse_args(argv)
    encoder, data = find_sources(args.encoder, args.data)
    for seed in range(args.seeds):
        for name in RUNS:
            train(args.output / f"seed-{seed}", name, encoder, data, seed, args.flags)
        results = [read(args.output / f"seed-{done}") for done in range(seed + 1)]
        text = table(results)
        (args.output / "results.json").write_text(json.dumps(results, indent=2))
        (args.output / "results.md").write_text(text + "\n")
    print(f"\n{text}")


def train(folder: Path, name: str, encoder: str, data: str, seed: int, flags: list[str]) -> None:
    _, phase, source, settings = RUNS[name]
    arguments = ["--dataset_name", data, "--seed", str(seed)]
    arguments += ["--tokenizer", str(folder / source)] if source else ["--image_encoder", encoder]
    arguments += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    run("train_drorae.py", f"emoji_drorae_phase{phase}.yaml", folder / name, *arguments, *flags)


def read(folder: Path) -> dict[str, dict[str, float]]:
    """Run -> the metrics of its last validation."""
    return {name: {metric: last(folder / name, f"validation/{metric}") for metric in METRICS} for name in RUNS}


def table(results: list[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds, and in how many of them a step made the error smaller."""
    lines = ["| | " + " | ".join(METRICS.values()) + " |", "|---" * (1 + len(METRICS)) + "|"]
    for name, (title, *_) in RUNS.items():
        cells = []
        for metric in METRICS:
            values = [result[name][metric] for result in results]
            spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.4f}{spread}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| smaller error | than | seeds |", "|---|---|---|"]
    for name, other in (
        ("fusion", "rae"),
        ("decoder", "fusion"),
        ("decoder", "rae-longer"),
        ("fusion", "last-fusion"),
        ("decoder", "last-decoder"),
    ):
        count = sum(result[name]["reconstruction"] < result[other]["reconstruction"] for result in results)
        lines.append(f"| {RUNS[name][0]} | {RUNS[other][0]} | {count} of {len(results)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
