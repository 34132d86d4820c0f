"""Plot the training curves of a run's stages from their logs, as in docs/experiments/emoji-128.md (needs matplotlib).

python experiments/plot_runs.py outputs/emoji docs/images/emoji_curves.png
python experiments/plot_runs.py outputs/emoji docs/images/emoji_starflow_curves.png --panels starflow
python experiments/plot_runs.py outputs/emoji256 docs/images/emoji256_curves.png --panels emoji256
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402


# Panel title, then (folder, log key, label) of its curves.
PANELS = {
    "fae": [
        (
            "stage Ia: feature cosine",
            [("1-fae", "feature_cosine", "train"), ("1-fae", "validation/feature_cosine", "validation")],
        ),
        (
            "stages Ib and II: PSNR in dB (validation)",
            [
                ("2-pixels", "validation/psnr_of_encoder_features", "Ib, of the encoder's features"),
                ("2-pixels", "validation/psnr", "Ib, whole tokenizer"),
                ("3-pixels", "validation/psnr", "II, whole tokenizer"),
            ],
        ),
        ("generator: loss", [("4-dit", "loss", "train"), ("4-dit", "validation/loss", "validation")]),
        ("generator: loss by noise time", [("4-dit", f"loss_t/0.{i}", f"t from 0.{i}") for i in (0, 2, 4, 6, 8)]),
    ],
    "emoji256": [
        (
            "stage Ia: feature cosine",
            [("1-fae", "feature_cosine", "train"), ("1-fae", "validation/feature_cosine", "validation")],
        ),
        (
            "stages Ib and II: mean squared error of pixels in [0, 1]",
            [("2-pixels", "loss", "Ib, noisy features"), ("3-fae", "loss", "II, decoded features")],
        ),
        ("LightningDiT: loss", [("4-dit", "loss", "train"), ("4-dit", "validation/loss", "validation")]),
        (
            "STARFlow: bits per dimension",
            [("5-starflow", "bits_per_dim", "train"), ("5-starflow", "validation/bits_per_dim", "validation")],
        ),
    ],
    "starflow": [
        (
            "flow: bits per dimension",
            [("5-starflow", "bits_per_dim", "train"), ("5-starflow", "validation/bits_per_dim", "validation")],
        ),
        (
            "tuned feature decoder: cosine on noisy latents",
            [("6-noisy", "feature_cosine", "train"), ("6-noisy", "validation/feature_cosine", "validation")],
        ),
    ],
}


def curve(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Images and values of one key."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    points = [(entry["images"], entry[key]) for entry in entries if entry.get(key) is not None]
    return tuple(zip(*points, strict=True)) if points else ([], [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the stages' folders")
    parser.add_argument("output", type=Path)
    parser.add_argument("--panels", choices=PANELS, default="fae")
    args = parser.parse_args()
    # Stages that a run has not reached yet are left out.
    panels = [panel for panel in PANELS[args.panels] if all((args.runs / curve[0]).is_dir() for curve in panel[1])]
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3.5 * rows), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, curves) in zip(axes.flat, panels):
        for folder, key, label in curves:
            images, values = curve(args.runs / folder, key)
            axis.plot(images, values, label=label, marker="." if "validation" in key else None)
        axis.set(title=title, xlabel="images")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(args.output, dpi=80)


if __name__ == "__main__":
    main()
