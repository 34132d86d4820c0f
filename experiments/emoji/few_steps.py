"""Few steps on Fluent Emoji at 256 px: MeanFlow from the shipped LightningDiT, beside its teacher. Three seeds.

    python experiments/emoji/few_steps.py --output outputs/emoji-few-steps
    python experiments/emoji/few_steps.py sheet --output outputs/emoji-few-steps

For each seed, train_few_steps.py distils `checkpoints/fae-dit-emoji-256` with `configs/emoji_few_steps.yaml` on the
latents of its tokenizer. `results.md` has `fid_effnet` and `kid_dinov2` of 300 samples against the training images,
for the teacher at 1, 2, 4 and 25 steps and for the model of few steps at 1, 2 and 4. `sheet` draws the same noise by
all of them, with the first seed's model. Interrupted runs resume.
"""

import sys
from pathlib import Path

import torch
from common import CLASSES, ROOT, find_judge
from experiment import evaluate, list_metrics, parse, repeat, train

from hf_fae import FAEDiTPipeline
from hf_fae.images import make_grid


TEACHER = ROOT / "checkpoints" / "fae-dit-emoji-256"
TOKENIZER = ROOT / "checkpoints" / "fae-emoji-256"
RESOLUTION = 256
SAMPLES = 300
# Model -> its numbers of steps.
STEPS = {"teacher": (1, 2, 4, 25), "few": (1, 2, 4)}
TITLES = {"teacher": "teacher", "few": "few steps"}
METRICS = {"fid_effnet": "fid_effnet", "kid_dinov2": "kid_dinov2"}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    only_sheet, argv = argv[:1] == ["sheet"], argv[argv[:1] == ["sheet"] :]
    args = parse(__doc__, "outputs/emoji-few-steps", argv)
    if only_sheet:
        sheet(args.output / "seed-0" / "few").save(args.output / "samples.png")
        return
    args.judge = find_judge(args.judge)
    latents = args.output / "latents"
    settings = {"dataset_name": args.data, "vae": TOKENIZER, "image_encoder": args.encoder, "random_flip": False}
    settings |= {"resolution": RESOLUTION, "mixed_precision": "no"}
    train("cache_latents.py", "emoji256_latents.yaml", latents, settings, [])
    repeat(args, lambda folder, seed: run_seed(folder, seed, latents, args), table)


def run_seed(folder: Path, seed: int, latents: Path, args) -> dict[str, dict[str, float]]:
    """Train and evaluate: {model and steps: {metric: number}}."""
    settings = {"pipeline": TEACHER, "dataset_name": latents, "random_flip": False, "seed": seed}
    train("train_few_steps.py", "emoji_few_steps.yaml", folder / "few", settings, args.flags)
    models = {"teacher": TEACHER, "few": folder / "few"}
    return {
        f"{name}-{steps}": sample_metrics(folder / f"{name}-{steps}-samples", models[name], steps, seed, args)
        for name, all_steps in STEPS.items()
        for steps in all_steps
    }


def sample_metrics(folder: Path, model: Path, steps: int, seed: int, args) -> dict[str, float]:
    """Distances of samples from the training images."""
    settings = {"model": model, "dataset_name": args.data, "split": "train", "label_column": "subgroup"}
    settings |= {"num_samples": SAMPLES, "num_inference_steps": steps, "seed": seed, "metrics": ["fid", "kid"]}
    settings |= {"extractors": [f"effnet={args.judge}", f"dinov2={args.encoder}"]}
    metrics = evaluate("generation", folder, settings | {"reference_cache": args.output / "reference"})
    return {name: metrics[name] for name in METRICS}


def table(results: list[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    titles = {
        f"{name}-{steps}": f"{TITLES[name]}, {steps} step{'s' * (steps > 1)}"
        for name, all_steps in STEPS.items()
        for steps in all_steps
    }
    return "\n".join(list_metrics(titles, METRICS, results))


def sheet(few: Path):
    """A row for each model and number of steps, a column for each class."""
    images = []
    for name, path in {"teacher": TEACHER, "few": few}.items():
        pipe = FAEDiTPipeline.from_pretrained(path)
        for steps in STEPS[name]:
            generators = [torch.Generator().manual_seed(number) for number in range(len(CLASSES))]
            images += pipe(CLASSES, num_inference_steps=steps, generator=generators).images
    return make_grid([image.resize((128, 128)) for image in images], columns=len(CLASSES))


if __name__ == "__main__":
    main()
