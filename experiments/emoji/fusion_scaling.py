"""DRoRAE's scaling law of the fusion (arXiv 2605.10780, section 4.3), measured on your tokenizer.

    python experiments/emoji/fusion_scaling.py outputs/drorae-phase1 --data ILSVRC/imagenet-1k --metric rfid
    python experiments/emoji/fusion_scaling.py outputs/drorae-phase1 --data ILSVRC/imagenet-1k --metric rfid \
        --hidden-sizes 3072 --layers 1 2 3 4 5 6 7 8 9 10 11 12 --output outputs/fusion-layers
    python experiments/emoji/fusion_scaling.py --paper

Phase 2 of train_drorae.py trains a fusion of each size before the frozen decoder of one RAE; `hf-fae evaluate
reconstruction` measures each. The table, the least-squares fit of the metric against log10 of the fusion's parameters
(and against the number of layers, if it varies) and the plot are written to `--output`. An interrupted sweep resumes.
--paper fits the points that the paper prints instead.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from common import ROOT, run_cli, run_python

from hf_fae import AutoencoderDRoRAE


CONFIG = ROOT / "training_scripts" / "configs" / "drorae" / "drorae_dinov2_base_phase2.yaml"
# The paper's rFID by the width of the experts of all 12 layers, and by the number of (deepest) layers of width 3072.
PAPER_WIDTHS = {128: 0.539, 256: 0.559, 512: 0.525, 1024: 0.519, 2048: 0.510, 3072: 0.471, 4096: 0.470, 6144: 0.459}
PAPER_LAYERS = {1: 0.570, 2: 0.530, 3: 0.568, 4: 0.518, 5: 0.540, 6: 0.515, 7: 0.522, 8: 0.507, 9: 0.466, 10: 0.541}
PAPER_LAYERS |= {11: 0.515, 12: 0.471}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", nargs="?", help="the RAE of phase 1: a folder or a Hub id")
    parser.add_argument("--paper", action="store_true", help="fit the paper's points, without training")
    parser.add_argument("--data", help="images: the train split to train on, the validation split to measure on")
    parser.add_argument("--config", type=Path, default=CONFIG, help="config of phase 2")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=list(PAPER_WIDTHS), help="widths of an expert")
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of layers, for each width (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each size; the paper has one")
    parser.add_argument("--metric", choices=["rfid", "psnr", "ssim", "lpips"], default="psnr")
    parser.add_argument("--judge", default="inception", help="of rFID, as --extractors of hf-fae evaluate")
    parser.add_argument("--output", type=Path, default=Path("outputs/fusion-scaling"), help="folder of all results")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="last: further flags of train_drorae.py, for every size"
    )
    args = parser.parse_args(argv)
    if not args.paper and not (args.tokenizer and args.data):
        parser.error("a tokenizer and --data are needed, or --paper")
    return args


def fusion_parameters(width: int, layers: int, channels: int = 768) -> int:
    """The paper's count: an expert and a row of the router for each layer."""
    return layers * (2 * channels * width + width + channels) + channels * layers**2 + layers


def paper_points() -> list[dict]:
    """The two sweeps of the paper, one after the other; both contain 12 layers of width 3072."""
    sizes = [(width, 12, value) for width, value in PAPER_WIDTHS.items()]
    sizes += [(3072, layers, value) for layers, value in PAPER_LAYERS.items()]
    return [
        {"hidden_size": width, "layers": layers, "parameters": fusion_parameters(width, layers), "values": [value]}
        for width, layers, value in sizes
    ]


def fit_line(x: list[float], y: list[float]) -> dict[str, float]:
    """Least squares: slope, intercept and the share of the variance that the line explains."""
    slope, intercept = np.polyfit(x, y, 1)
    residuals = np.asarray(y) - (slope * np.asarray(x) + intercept)
    r2 = 1 - residuals.var() / np.var(y)
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(r2)}


def fit(points: list[dict]) -> dict[str, dict]:
    """The metric of all runs against log10 of the parameters, and against the layers where these alone vary."""
    runs = [(point, value) for point in points for value in point["values"]]
    values = [value for _, value in runs]
    measures = {"log10 of parameters": [np.log10(point["parameters"]) for point, _ in runs]}
    if len({point["hidden_size"] for point in points}) == 1:
        measures["layers"] = [point["layers"] for point, _ in runs]
    return {name: fit_line(x, values) for name, x in measures.items() if len(set(x)) > 1}


def train_and_measure(args: argparse.Namespace, width: int, layers: int | None, seed: int) -> tuple[dict, float]:
    """Train and measure one size: its fusion's description, and the metric."""
    run = args.output / f"h{width}-l{layers or 'all'}-s{seed}"
    report = run / "evaluation" / "report.json"
    if not report.exists():
        command = [ROOT / "training_scripts" / "train_drorae.py", "--config", args.config, "--phase", 2]
        command += ["--tokenizer", args.tokenizer, "--dataset_name", args.data, "--expert_hidden_size", width]
        command += ["--fusion_layers", layers] if layers else []
        command += ["--seed", seed, "--resume_from_checkpoint", "latest", *args.flags, "--output_dir", run]
        run_python(command)
        command = ["evaluate", "reconstruction", "--model", run, "--dataset_name", args.data]
        command += ["--extractors", args.judge] if args.metric == "rfid" else []
        run_cli([*command, "--metrics", args.metric, "--output_dir", report.parent])
    metrics = json.loads(report.read_text())["metrics"]
    (value,) = (number for name, number in metrics.items() if name.startswith(args.metric))
    vae = AutoencoderDRoRAE.from_pretrained(run, image_encoder=None)
    parameters = sum(parameter.numel() for parameter in vae.fusion.parameters())
    return {"hidden_size": width, "layers": vae.config.fusion_layers, "parameters": parameters}, value


def table(points: list[dict], metric: str) -> str:
    """Markdown: the sizes and their metric, mean and standard deviation over the seeds."""
    lines = [f"| width | layers | parameters | {metric} |", "|---|---|---|---|"]
    for point in points:
        values = point["values"]
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        size = f"{point['hidden_size']} | {point['layers']} | {point['parameters'] / 1e6:.2f} M"
        lines.append(f"| {size} | {mean(values):.4f}{spread} |")
    return "\n".join(lines)


def write(points: list[dict], metric: str, folder: Path) -> str:
    """Write `results.json`, `results.md` and `results.png`; returns the text of the second."""
    folder.mkdir(parents=True, exist_ok=True)
    fits = fit(points)
    lines = [
        f"{metric} = {line['slope']:.4g} x {name} + {line['intercept']:.4g}, R2 {line['r2']:.3f}"
        for name, line in fits.items()
    ]
    text = "\n\n".join([table(points, metric), *lines])
    (folder / "results.json").write_text(json.dumps({"metric": metric, "points": points, "fits": fits}, indent=2))
    (folder / "results.md").write_text(text + "\n")
    plot(points, fits, metric, folder / "results.png")
    return text


def plot(points: list[dict], fits: dict, metric: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for point in points:
        axis.plot([point["parameters"]] * len(point["values"]), point["values"], "o", color="C0")
        label, place = f"{point['hidden_size']} x {point['layers']}", (point["parameters"], mean(point["values"]))
        axis.annotate(label, place, textcoords="offset points", xytext=(0, 6), ha="center", size="small")
    if line := fits.get("log10 of parameters"):
        ends = np.array([min(p["parameters"] for p in points), max(p["parameters"] for p in points)])
        axis.plot(ends, line["slope"] * np.log10(ends) + line["intercept"], "--", label=f"R2 {line['r2']:.2f}")
        axis.legend()
    axis.set(xscale="log", xlabel="parameters of the fusion (labels: width x layers)", ylabel=metric)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.paper:
        points = paper_points()
        for name, part in (("widths", points[:8]), ("layers", points[8:]), ("all", points)):
            print(f"\n{name}\n\n{write(part, 'rfid', args.output / f'paper-{name}')}")
        return
    points = []
    for width in args.hidden_sizes:
        for layers in args.layers or [None]:
            runs = [train_and_measure(args, width, layers, seed) for seed in range(args.seeds)]
            points.append({**runs[0][0], "values": [value for _, value in runs]})
            text = write(points, args.metric, args.output)  # after every size: a sweep may be interrupted
    print(f"\n{text}\n\nwrote {args.output}/results.md")


if __name__ == "__main__":
    main()
