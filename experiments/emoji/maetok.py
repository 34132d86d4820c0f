"""MAETok on Fluent Emoji at 64 px: do masks and targets make latents easier to model? Three seeds.

    python experiments/emoji/maetok.py --output outputs/emoji-maetok

For each seed, train_maetok.py trains a tokenizer of 16 latents with `configs/emoji_maetok.yaml`: without masks, with
masks, with each auxiliary target, and with other mask ratios. `results.md` has the negative log-likelihood of Gaussian
mixtures on latents, in nats per dimension; the held-out loss of a small denoiser; a linear probe of the nine groups;
and the PSNR of reconstructions. Interrupted runs resume.
"""

from pathlib import Path

import torch
from common import last_value
from experiment import list_metrics, parse, repeat, shrink, train

from hf_fae import AutoencoderMAETok
from hf_fae.evaluation.inputs.numbered_images import ImageArguments, NumberedImages
from hf_fae.evaluation.metrics.classifiers import linear_probe
from hf_fae.evaluation.metrics.denoising_loss import denoising_loss
from hf_fae.evaluation.metrics.latent_space import mode_count_curve, reduce_spaces
from hf_fae.images import from_uint8
from hf_fae.latents import encode_images


# Run -> its name in the table, its targets (names of TARGETS), and its settings.
TARGETS = {"hog": "hog=1.0", "dinov2": "dinov2:{encoder}=1.0"}
RUNS = {
    "plain": ("plain autoencoder", [], {"min_mask_ratio": 0.0, "max_mask_ratio": 0.0}),
    "masks": ("masks, 40 to 60 %", [], {}),
    "hog": ("masks and HOG", ["hog"], {}),
    "dinov2": ("masks and DINOv2", ["dinov2"], {}),
    "both": ("masks, HOG and DINOv2", ["hog", "dinov2"], {}),
    "hog-0-60": ("masks, 0 to 60 %, and HOG", ["hog"], {"min_mask_ratio": 0.0}),
    "hog-10-40": ("masks, 10 to 40 %, and HOG", ["hog"], {"min_mask_ratio": 0.1, "max_mask_ratio": 0.4}),
}
METRICS = {
    "nll": "NLL of the latents",
    "held_out_nll": "held out",
    "denoising_loss": "denoising loss",
    "linear": "linear probe",
    "psnr": "PSNR in dB",
}
RESOLUTION = 64
MIXTURES = {"components": [5, 10, 50], "covariance_type": "diag"}
MAX_DIMENSION = 64
BATCH = 64
DENOISER = {"steps": 300, "batch_size": 32}
PROBE = {"steps": 1000, "batch_size": 256}


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, "outputs/emoji-maetok", argv)
    args.data = shrink(args.data, RESOLUTION, args.output / "images")

    def once(folder, seed):
        for name in RUNS:
            train_run(folder / name, name, seed, args)
        return measure({name: folder / name for name in RUNS}, args.data, seed)

    repeat(args, once, table)


def train_run(folder: Path, name: str, seed: int, args) -> None:
    _, targets, settings = RUNS[name]
    settings = {"dataset_name": args.data, "seed": seed, **settings}
    if targets:
        settings["auxiliary_targets"] = [TARGETS[target].format(encoder=args.encoder) for target in targets]
    train("train_maetok.py", "emoji_maetok.yaml", folder, settings, args.flags)


def measure(tokenizers: dict[str, Path], data: str, seed: int) -> dict[str, dict[str, float]]:
    """Metrics of the tokenizers' latents; mixtures are fitted to equally many principal components of each."""
    models = {name: AutoencoderMAETok.from_pretrained(folder).eval() for name, folder in tokenizers.items()}
    size = next(iter(models.values())).config.sample_size
    images = ImageArguments(dataset_name=data, label_column="group").open(size, seed, train_split="train")
    fitted, held_out = (encode(models, NumberedImages(images, split)) for split in ("train", "validation"))
    labels, held_out_labels = (split.pop("labels") for split in (fitted, held_out))
    reduced = reduce_spaces(fitted, held_out, max_dimension=MAX_DIMENSION)
    metrics = {}
    for name, folder in tokenizers.items():
        curve = mode_count_curve(reduced.train[name], reduced.held_out[name], **MIXTURES, seed=seed)
        inputs, held_out_inputs = ({"flatten": split[name].flatten(1)} for split in (fitted, held_out))
        probe = linear_probe(inputs, labels, held_out_inputs, held_out_labels, **PROBE, seed=seed)
        metrics[name] = {
            "nll": curve[-1]["nll"] / reduced.dimension,
            "held_out_nll": min(point["held_out_nll"] for point in curve) / reduced.dimension,
            "denoising_loss": denoising_loss(fitted[name], held_out[name], **DENOISER, seed=seed).loss,
            "linear": probe.accuracy,
            "psnr": last_value(folder, "validation/psnr"),
        }
    return metrics


@torch.no_grad()
def encode(models: dict[str, AutoencoderMAETok], images: NumberedImages) -> dict[str, torch.Tensor]:
    """Tokenizer -> normalised latents (N, C, 1, L) of images, and "labels" (N,), their groups."""
    parts = {name: [] for name in (*models, "labels")}
    for start in range(0, len(images), BATCH):
        batch = images.read(range(start, min(start + BATCH, len(images))))
        parts["labels"].append(batch["class_labels"])
        for name, vae in models.items():
            parts[name].append(encode_images(vae, from_uint8(batch["images"])).mode())
    return {name: torch.cat(part) for name, part in parts.items()}


def table(results: list[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds, and the number of seeds in which one beat another."""
    lines = list_metrics({name: title for name, (title, *_) in RUNS.items()}, METRICS, results)
    lines += ["", "| better | of | than | seeds |", "|---|---|---|---|"]
    for name, other in (("masks", "plain"), ("hog", "masks"), ("dinov2", "masks"), ("both", "masks")):
        for metric in METRICS:
            sign = 1 if metric in ("linear", "psnr") else -1
            count = sum(sign * (result[name][metric] - result[other][metric]) > 0 for result in results)
            lines.append(f"| {METRICS[metric]} | {RUNS[name][0]} | {RUNS[other][0]} | {count} of {len(results)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
