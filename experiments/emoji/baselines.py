"""Seven tokenizers of Fluent Emoji at 64 px at equal budgets, and a generator on each. Three seeds of the generator.

    python experiments/emoji/baselines.py --output outputs/emoji-baselines

A VAE of pixels, VA-VAE, RAE, FAE, DRoRAE, l-DeTok and MAETok see 3,000 batches of 16 images over all of their stages;
those with a frozen encoder, VA-VAE among them, have DINOv2-small. `results.md` has PSNR, rFID and iFID of the
validation images, and `fid_effnet` of samples of a LightningDiT on the latents, against the training images.
Interrupted runs resume.
"""

from pathlib import Path

from common import find_judge
from experiment import (
    ENCODER,
    cache_latents,
    evaluate,
    evaluate_fid,
    parse,
    repeat,
    shrink,
    spread,
    train,
    train_stages,
)
from generators import TOKENIZERS as OF_GENERATORS


# Stages: script, config and settings.
VAE = ("train_vae.py", "emoji_vae.yaml")
DECODER = ("train_drorae.py", "emoji_raev2_decoder.yaml")  # of the last layer, without a spatial mean: RAE
# Tokenizer -> its name in the table, and its stages.
TOKENIZERS = {
    "vae": ("pixel VAE", [(*VAE, {})]),
    "va-vae": ("VA-VAE", [(*VAE, {"alignment_encoder": ENCODER})]),
    "rae": ("RAE", [(*DECODER, {"max_train_steps": 3000})]),
    "drorae": (
        "DRoRAE",
        [
            (*DECODER, {"max_train_steps": 1500}),
            (*DECODER, {"max_train_steps": 900, "phase": 2, "expert_hidden_size": 384}),
            (*DECODER, {"max_train_steps": 600, "phase": 3}),
        ],
    ),
    **OF_GENERATORS,
}
METRICS = {"psnr": "PSNR in dB", "rfid_effnet": "rfid_effnet", "ifid_effnet": "ifid_effnet"}
RESOLUTION = 64
SAMPLES = 300


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, "outputs/emoji-baselines", argv)
    judge = find_judge(args.judge)
    args.data = shrink(args.data, RESOLUTION, args.output / "images")
    latents, metrics = args.output / "latents", {}
    for name, (_, stages) in TOKENIZERS.items():
        tokenizer = train_stages(args.output / "tokenizers" / name, stages, args)
        cache_latents(tokenizer, latents / name, args.data, RESOLUTION)
        metrics[name] = reconstruction_metrics(tokenizer, args, judge)

    def once(folder, seed):
        return {name: sample_fid(folder / name, latents / name, seed, args, judge) for name in TOKENIZERS}

    repeat(args, once, lambda results: table(results, metrics))


def reconstruction_metrics(tokenizer: Path, args, judge: str) -> dict[str, float]:
    """PSNR, rFID and iFID of the validation images."""
    settings = {"model": tokenizer, "dataset_name": args.data, "encoder": args.encoder}
    settings |= {"metrics": ["psnr", "rfid", "ifid"], "extractors": f"effnet={judge}"}
    metrics = evaluate("reconstruction", tokenizer.with_name("reconstruction"), settings)
    return {name: metrics[name] for name in METRICS}


def sample_fid(folder: Path, latents: Path, seed: int, args, judge: str) -> float:
    """Train a LightningDiT on cached latents; `fid_effnet` of its samples."""
    settings = {"dataset_name": latents, "seed": seed, "dimension_shift": True}
    train("train_generator.py", "emoji_table_generator.yaml", folder, settings, args.flags)
    return evaluate_fid(folder, args, judge, SAMPLES)


def table(results: list[dict], metrics: dict[str, dict[str, float]]) -> str:
    """Markdown: a line for each tokenizer, with mean and deviation of `fid_effnet` over the seeds.

    Args:
        metrics: of the tokenizers.
    """
    lines = ["| | " + " | ".join([*METRICS.values(), "fid_effnet of samples"]) + " |", "|---" * 5 + "|"]
    for name, (title, _) in TOKENIZERS.items():
        cells = [f"{metrics[name][metric]:.2f}" for metric in METRICS]
        lines.append(f"| {title} | {' | '.join(cells)} | {spread([result[name] for result in results])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
