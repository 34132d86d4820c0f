"""FAE's single attention layer against a linear map: feature reconstruction (arXiv 2512.07829, Table 5).

    python experiments/emoji/encoder_ablation.py

Features of a frozen encoder are extracted once; then stage Ia trains each kind of encoder, in pairs with the same
seed: same initial feature decoder, batches, posterior noise, steps and learning rate. The metric is the cosine of raw
features and their reconstructions from posterior modes, over the whole validation split. Tables are printed and, with
all numbers, written to `--output`.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import find_sources
from torch.nn import functional as F

from hf_fae import AutoencoderFAE, VisionEncoder
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.statistics import channel_statistics
from hf_fae.objectives.fae import FeatureObjective, kl_divergence
from hf_fae.training.loop import LoopArguments, TrainingLoop
from hf_fae.utils.image_metrics import feature_cosine


ENCODER_TYPES = ("attention", "linear")
PATCH_SIZE = 16


def parse_args() -> argparse.Namespace:
    bf16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="DINOv2-small: a folder or a Hub id (default: the assets, else the Hub)")
    parser.add_argument("--data", help="Fluent Emoji: a folder or a Hub id (default: the assets)")
    parser.add_argument("--resolution", type=int, default=128, help="image side: 128 is a grid of 8x8, 256 of 16x16")
    parser.add_argument("--latent-channels", type=int, default=16)
    parser.add_argument("--decoder-layers", type=int, default=2, help="the paper has 6, which is slower")
    parser.add_argument("--kl-weight", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3, help="number of pairs of runs")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--evaluations", type=int, default=4, help="number of equally spaced evaluations")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[2e-3, 4e-3], help="one table each")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="bf16" if bf16 else "no")
    parser.add_argument("--output", type=Path, default=Path("outputs/encoder-ablation"), help="folder of the results")
    args = parser.parse_args()
    args.encoder, args.data = find_sources(args.encoder, args.data)
    return args


class CachedFeatures:
    """Training features (images, N, C) in endless shuffled batches, without the remainder of each epoch."""

    def __init__(self, features: torch.Tensor, seed: int):
        self.features, self.seed = features, seed

    def batches(self, batch_size: int, **where):
        rng, count = np.random.default_rng(self.seed), len(self.features)
        while True:
            for indices in rng.permutation(count)[: count // batch_size * batch_size].reshape(-1, batch_size):
                yield {"pixel_values": self.features[torch.from_numpy(indices)]}


class FeatureFAE(AutoencoderFAE):
    """An FAE whose input is features, so that the objective of stage Ia runs on cached ones."""

    def extract_features(self, pixel_values):
        return pixel_values.float(), (self.config.sample_size // PATCH_SIZE,) * 2


@torch.no_grad()
def extract(args, split: str) -> torch.Tensor:
    """The raw features (images, N, C) of a whole split, in fp16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = VisionEncoder.from_pretrained(args.encoder, dtype=torch.float32).to(device)
    data_args = DataArguments(
        args.data, validation_split=split, resolution=args.resolution, max_validation_samples=10**9
    )
    grid = (args.resolution // PATCH_SIZE,) * 2
    features = []
    for batch in ImageData(data_args).validation_batches(args.batch_size):
        with torch.autocast(device, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            tokens = encoder(batch["pixel_values"].to(device), grid=grid).last_hidden_state
        features.append(tokens.half().cpu())
    return torch.cat(features)


def build_pair(args, features: torch.Tensor, seed: int) -> dict[str, FeatureFAE]:
    """A new FAE of each encoder type, with equal feature decoders, standardised by the training features."""
    models = {}
    for encoder_type in ENCODER_TYPES:
        torch.manual_seed(seed)
        models[encoder_type] = FeatureFAE(
            feature_dim=features.shape[2],
            latent_channels=args.latent_channels,
            sample_size=args.resolution,
            patch_size=PATCH_SIZE,
            encoder_type=encoder_type,
            decoder_num_layers=args.decoder_layers,
            pixel_num_layers=0,  # not used
        )
        models[encoder_type].set_feature_statistics(*channel_statistics(features.split(256)))
    models["linear"].feature_decoder.load_state_dict(models["attention"].feature_decoder.state_dict())
    return models


def train(args, model: FeatureFAE, splits: tuple, *, seed: int, learning_rate: float) -> dict:
    """One run: validation metrics by step, and CPU seconds per training step (wall seconds on a GPU).

    Args:
        splits: features of the training and of the validation split.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    (train_features, validation_features), curve, training_time = splits, {}, 0.0

    def validate(step):
        nonlocal started, training_time
        training_time += clock() - started
        sums = torch.zeros(3)
        for features in validation_features.split(args.batch_size):
            features, grid = model.extract_features(features.to(model.device))
            posterior = model.encode_features(features, grid).latent_dist
            reconstruction = model.decode_features(posterior.mode())
            error = F.mse_loss(*map(model.standardize_features, (reconstruction, features)))
            kl = kl_divergence(posterior.mean, posterior.logvar)
            numbers = torch.stack([feature_cosine(reconstruction, features), error, kl])
            sums += numbers.cpu() * len(features) / len(validation_features)
        curve[step] = dict(zip(("cosine", "mse", "kl"), sums.tolist(), strict=True))
        started = clock()
        return {"feature_cosine": curve[step]["cosine"]}

    with tempfile.TemporaryDirectory() as folder:
        loop_args = LoopArguments(
            folder,
            max_train_steps=args.steps,
            train_batch_size=args.batch_size,
            learning_rate=learning_rate,
            lr_scheduler="cosine",
            lr_warmup_steps=args.steps // 10,
            ema_decay=0,
            mixed_precision=args.mixed_precision,
            seed=seed,
            validation_steps=args.steps // args.evaluations,
            checkpointing_steps=args.steps,
            report_to="none",
        )
        loop = TrainingLoop(loop_args)
        started = clock()
        objective = FeatureObjective(model.to(loop.device), args.kl_weight)
        loop.run(objective, CachedFeatures(train_features, seed), validate)
    return {"curve": curve, "seconds_per_step": training_time / args.steps}


def table(runs: dict[str, list[dict]], parameters: dict[str, int]) -> str:
    """Markdown: cosine by step and paired differences, mean ± standard deviation over the seeds."""

    def row(name, cells):
        return f"| {name} | " + " | ".join(cells) + " |"

    def spread(values, sign=""):
        deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{sign}.4f}{deviation}"

    steps = list(runs["linear"][0]["curve"])
    cosines = {k: [[run["curve"][s]["cosine"] for run in runs[k]] for s in steps] for k in ENCODER_TYPES}
    header = ["encoder", *(f"step {step}" for step in steps), "MSE", "KL", "encoder parameters"]
    header.append("s / step" if torch.cuda.is_available() else "CPU s / step")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for kind in ENCODER_TYPES:
        last = [run["curve"][steps[-1]] for run in runs[kind]]
        numbers = [f"{statistics.mean(run[name] for run in last):.3f}" for name in ("mse", "kl")]
        seconds = statistics.mean(run["seconds_per_step"] for run in runs[kind])
        cells = [*map(spread, cosines[kind]), *numbers, f"{parameters[kind]:,}", f"{seconds:.2f}"]
        lines.append(row(kind, cells))
    differences = [
        [a - b for a, b in zip(*pair, strict=True)] for pair in zip(*map(cosines.get, ENCODER_TYPES), strict=True)
    ]
    lines.append(row("difference", [*(spread(values, "+") for values in differences), "", "", "", ""]))
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train_features, validation_features = extract(args, "train"), extract(args, "validation")
    mean = train_features.double().mean((0, 1)).float().expand_as(validation_features)
    baseline = feature_cosine(mean, validation_features).item()
    print(f"features: train {tuple(train_features.shape)}, validation {tuple(validation_features.shape)}")
    report, results = [f"Cosine of the training mean alone: {baseline:.4f}"], {}
    for learning_rate in args.learning_rate:
        runs = {kind: [] for kind in ENCODER_TYPES}
        for seed in range(args.seeds):
            models = build_pair(args, train_features, seed)
            for kind, model in models.items():
                splits = (train_features, validation_features)
                runs[kind].append(train(args, model, splits, seed=seed, learning_rate=learning_rate))
        parameters = {kind: sum(p.numel() for p in model.encoder.parameters()) for kind, model in models.items()}
        results[learning_rate] = runs
        report.append(f"Learning rate {learning_rate:g}:\n\n{table(runs, parameters)}")
        # After every learning rate: a long sweep may be interrupted.
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        numbers = {"settings": settings, "mean_cosine": baseline, "parameters": parameters, "runs": results}
        (args.output / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
        (args.output / "results.md").write_text("\n\n".join(report) + "\n")
    print("\n\n".join(["", *report]))


if __name__ == "__main__":
    main()
