"""l-DeTok on Fluent Emoji at 64 px: do noise and masks make latents robust and easier to generate? Three seeds.

    python experiments/emoji/detok.py --output outputs/emoji-detok

For each seed and corruption of latents, train_detok.py trains a tokenizer of 16 latents with
`configs/emoji_detok.yaml`, then train_generator.py a small SiT on its latents, equally long for all; then the decoder
alone is trained for as long again (stage 2). `results.md` has the mean squared error (of pixels in [0, 1]) of
validation images decoded from clean latents, from noisy ones, and from those of half of the patches; and `fid_effnet`
of samples, before and after stage 2. Noise is (1 - tau) z + tau eps on normalised latents, so that its strength is the
same for all tokenizers. `damaged.png` has validation images and their reconstructions by the plain autoencoder and the
one with noise and masks of the first seed: from clean latents, with tau = 0.5, and from half of the patches.
Interrupted runs resume.
"""

from pathlib import Path

import torch
from common import find_judge
from experiment import (
    cache_latents,
    evaluate_fid,
    list_metrics,
    parse,
    repeat,
    shrink,
    train,
    validation_images,
)

from hf_fae import AutoencoderDeTok, FAEDiTPipeline
from hf_fae.images import make_grid, to_pil
from hf_fae.objectives.detok import select_visible_patches
from hf_fae.utils.randomness import ImageRandom


# Run -> its name in the table, and its settings.
RUNS = {
    "plain": ("plain autoencoder", {"noise_gamma": 0.0, "max_mask_ratio": 0.0}),
    "masks": ("masks", {"noise_gamma": 0.0}),
    "noise": ("noise, gamma 3", {"max_mask_ratio": 0.0}),
    "both": ("noise and masks", {}),
    "additive": ("additive noise and masks", {"noise_type": "add"}),
    "gamma-1": ("noise, gamma 1, and masks", {"noise_gamma": 1.0}),
    "gamma-2": ("noise, gamma 2, and masks", {"noise_gamma": 2.0}),
    "gamma-5": ("noise, gamma 5, and masks", {"noise_gamma": 5.0}),
}
NOISE_LEVELS = (0.0, 0.25, 0.5, 0.75)
MASKED = 0.5
METRICS = {f"error_{tau}": f"error at tau = {tau}" for tau in NOISE_LEVELS}
METRICS |= {"error_masked": "half of the patches", "fid_effnet": "fid_effnet of samples"}
METRICS |= {"tuned_error": "error, decoder tuned", "tuned_fid_effnet": "fid_effnet, decoder tuned"}
RESOLUTION = 64
SAMPLES = 300
# Of `damaged.png`.
SHOWN, SHOWN_CORRUPTIONS, COLUMNS = ("plain", "both"), ("error_0.0", "error_0.5", "error_masked"), 12


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, "outputs/emoji-detok", argv)
    judge = find_judge(args.judge)
    args.data = shrink(args.data, RESOLUTION, args.output / "images")

    def once(folder, seed):
        return {name: measure(folder, name, seed, args, judge) for name in RUNS}

    repeat(args, once, table)
    save_corrupt(args.output / "damaged.png", args.output / "seed-0", args.data)


def measure(folder: Path, name: str, seed: int, args, judge: str) -> dict[str, float]:
    """Train the tokenizer and the generator of a run, then the decoder alone; the metrics before and after that."""
    parts = ("", "-latents", "-sit", "-tuned", "-tuned-sit")
    tokenizer, latents, generator, tuned, tuned_generator = (folder / f"{name}{part}" for part in parts)
    data, common = {"dataset_name": args.data}, {"seed": seed}
    train("train_detok.py", "emoji_detok.yaml", tokenizer, {**data, **common, **RUNS[name][1]}, args.flags)
    cache_latents(tokenizer, latents, args.data, RESOLUTION)
    train("train_generator.py", "emoji_sit.yaml", generator, {"dataset_name": latents, **common}, args.flags)
    settings = {**data, **common, "stage": 2, "tokenizer": tokenizer}
    train("train_detok.py", "emoji_detok.yaml", tuned, settings, args.flags)
    pipe = FAEDiTPipeline.from_pretrained(generator, vae=AutoencoderDeTok.from_pretrained(tuned))
    pipe.save_pretrained(tuned_generator)
    return {
        **corrupt_errors(tokenizer, args.data),
        "fid_effnet": evaluate_fid(generator, args, judge, SAMPLES),
        "tuned_error": corrupt_errors(tuned, args.data)["error_0.0"],
        "tuned_fid_effnet": evaluate_fid(tuned_generator, args, judge, SAMPLES),
    }


def corrupt_errors(tokenizer: Path, data: str) -> dict[str, float]:
    """Mean squared errors of validation images in [0, 1], by corruption of their latents."""
    vae = AutoencoderDeTok.from_pretrained(tokenizer).eval()
    sums, count = {}, 0
    for images in validation_images(data, vae.config.sample_size).split(32):
        for name, decoded in decode_corrupt(vae, images, ImageRandom(0, count)).items():
            sums[name] = sums.get(name, 0.0) + ((decoded - images) / 2).square().mean((1, 2, 3)).sum().item()
        count += len(images)
    return {name: total / count for name, total in sums.items()}


@torch.no_grad()
def decode_corrupt(vae: AutoencoderDeTok, images: torch.Tensor, random: ImageRandom) -> dict[str, torch.Tensor]:
    """Images (B, 3, H, W) decoded from noisy latents, and from those of half of the patches."""
    latents = vae.encode(images).latent_dist.mode()
    noise = random.normal(*latents.shape)
    decoded = {f"error_{tau}": vae.decode(torch.lerp(latents, noise, tau)).sample for tau in NOISE_LEVELS}
    visible = select_visible_patches(random.uniform(len(images), vae.grid[0] * vae.grid[1]), MASKED)
    return {**decoded, "error_masked": vae(images, visible).sample}


def save_corrupt(path: Path, folder: Path, data: str) -> None:
    """Save validation images above their reconstructions from corrupt latents by the tokenizers of `SHOWN`."""
    tokenizers = [AutoencoderDeTok.from_pretrained(folder / name).eval() for name in SHOWN]
    images = validation_images(data, RESOLUTION, COLUMNS)
    decoded = [decode_corrupt(vae, images, ImageRandom(0, 0)) for vae in tokenizers]
    rows = [images, *(found[corruption] for corruption in SHOWN_CORRUPTIONS for found in decoded)]
    make_grid([image for row in rows for image in to_pil(row)], columns=len(images)).save(path)


def table(results: list[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds, and the number of seeds in which one beat another."""
    lines = list_metrics({name: title for name, (title, *_) in RUNS.items()}, METRICS, results)
    lines += ["", "| smaller | of | than | seeds |", "|---|---|---|---|"]
    for metric, name, other in (
        ("error_0.5", "both", "plain"),
        ("error_masked", "both", "plain"),
        ("fid_effnet", "both", "plain"),
        ("fid_effnet", "both", "additive"),
        ("tuned_fid_effnet", "both", "plain"),
        ("tuned_fid_effnet", "both", "additive"),
    ):
        count = sum(result[name][metric] < result[other][metric] for result in results)
        lines.append(f"| {METRICS[metric]} | {RUNS[name][0]} | {RUNS[other][0]} | {count} of {len(results)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
