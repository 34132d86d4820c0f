"""Do masks and targets make latents that are easier to model? MAETok on Fluent Emoji at 128 px, three seeds.

    python training_scripts/emoji_maetok.py --output outputs/emoji-maetok

For every seed, by train_maetok.py with the config `configs/emoji_maetok.yaml`: a tokenizer of 32 latents without
masks, with masks, with each auxiliary target, and with other shares of masked patches. `results.md` has what
`hf-fae evaluate` says of their latents: negative log-likelihood of mixtures of Gaussians, held-out loss of a small
denoiser, a linear probe of the nine groups; and the PSNR of reconstructions. A run that was stopped goes on where it
was.
"""

from pathlib import Path

from demo import last
from experiment import evaluate, parse, repeat, spread, train


# Run -> what it is in the table, its targets (names of TARGETS), and its settings.
TARGETS = {"hog": "hog=1.0", "dinov2": "dinov2:{encoder}=1.0"}
RUNS = {
    "plain": ("plain autoencoder", [], {"min_mask_ratio": 0.0, "max_mask_ratio": 0.0}),
    "masks": ("masks, 40 to 60 %", [], {}),
    "hog": ("masks and HOG", ["hog"], {}),
    "dinov2": ("masks and DINOv2", ["dinov2"], {}),
    "both": ("masks, HOG and DINOv2", ["hog", "dinov2"], {}),
    "hog-0-60": ("masks, 0 to 60 %, and HOG", ["hog"], {"min_mask_ratio": 0.0}),
    "hog-10-40": ("masks, 10 to 40 %, and HOG", ["hog"], {"min_mask_ratio": 0.1, "max_mask_ratio": 0.4}),
    "hog-20-60": ("masks, 20 to 60 %, and HOG", ["hog"], {"min_mask_ratio": 0.2}),
    "hog-40-40": ("masks, 40 %, and HOG", ["hog"], {"max_mask_ratio": 0.4}),
}
METRICS = {
    "nll_latents": "NLL of the latents",
    "held_out_nll_latents": "held out",
    "denoising_loss_latents": "denoising loss",
    "linear_latents": "linear probe",
    "psnr": "PSNR in dB",
}
# As many principal components for all tokenizers, or their likelihoods could not be compared.
LATENTS = {"components": [5, 10, 50], "covariance_type": "diag", "max_dimension": 64, "denoising_steps": 1000}
PROBE = {"label_column": "group", "probe_steps": 1000, "probe_batch_size": 256}


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, "outputs/emoji-maetok", argv)

    def once(folder, seed):
        return {name: measure(folder, name, seed, args) for name in RUNS}

    repeat(args, once, table)


def measure(folder: Path, name: str, seed: int, args) -> dict[str, float]:
    """Train the tokenizer of a run; its metrics."""
    _, targets, settings = RUNS[name]
    settings = {"dataset_name": args.data, "seed": seed, **settings}
    if targets:
        settings["auxiliary_targets"] = [TARGETS[target].format(encoder=args.encoder) for target in targets]
    train("train_maetok.py", "emoji_maetok.yaml", folder / name, settings, args.flags)
    common = {"model": folder / name, "dataset_name": args.data}
    found = evaluate("latents", folder / f"{name}-evaluated", {**common, **LATENTS})
    found |= evaluate("probe", folder / f"{name}-probe", {**common, **PROBE})
    found["psnr"] = last(folder / name, "validation/psnr")
    return {metric: found[metric] for metric in METRICS}


def table(results: list[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds, and in how many of them one was better than another."""
    lines = ["| | " + " | ".join(METRICS.values()) + " |", "|---" * (1 + len(METRICS)) + "|"]
    for name, (title, *_) in RUNS.items():
        cells = [spread([result[name][metric] for result in results]) for metric in METRICS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| better | of | than | seeds |", "|---|---|---|---|"]
    for name, other in (("masks", "plain"), ("hog", "masks"), ("dinov2", "masks"), ("both", "masks")):
        for metric in METRICS:
            sign = 1 if metric in ("linear_latents", "psnr") else -1
            count = sum(sign * (result[name][metric] - result[other][metric]) > 0 for result in results)
            lines.append(f"| {METRICS[metric]} | {RUNS[name][0]} | {RUNS[other][0]} | {count} of {len(results)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
