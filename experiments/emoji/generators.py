"""Six generators on the latents of three tokenizers of Fluent Emoji at 64 px. Three seeds.

    python experiments/emoji/generators.py --output outputs/emoji-generators

The tokenizers, an FAE on DINOv2-small, an l-DeTok and a MAETok, encode 64 px images to 16 latents of 16 channels, and
are trained equally long over all of their stages. The generators have 2.6 to 2.9 million parameters and are trained
for equally many steps, by `train_generator.py` and `train_autoregressive.py`. `results.md` has `fid_effnet` of samples
against the training images, and rFID of the tokenizers on the validation images, with the same feature extractor. For
the first seed on l-DeTok's latents, `samples.png` has samples, a row per generator, and `kept.png` validation images,
their upper halves, and the completions of these by MAR, RasterAR and RandomAR. Interrupted runs resume.
"""

from pathlib import Path

import torch
from common import CLASSES, find_judge
from experiment import cache_latents, evaluate, evaluate_fid, parse, repeat, shrink, spread, train, train_stages

from hf_fae import FAEDiTPipeline, FAEMARPipeline
from hf_fae.evaluation.inputs.numbered_images import ImageArguments, NumberedImages
from hf_fae.images import from_uint8, make_grid, to_pil


# Tokenizer -> its name in the table, and its stages: script, config and settings of each.
TOKENIZERS = {
    "fae": (
        "FAE",
        [
            ("train_fae.py", "emoji_table_fae.yaml", {}),
            ("train_pixel_decoder.py", "emoji_table_pixel_decoder.yaml", {"stage": "Ib"}),
            ("train_pixel_decoder.py", "emoji_table_pixel_decoder.yaml", {"stage": "II"}),
        ],
    ),
    "detok": (
        "l-DeTok",
        [
            ("train_detok.py", "emoji_detok.yaml", {"max_train_steps": 2000}),
            ("train_detok.py", "emoji_detok.yaml", {"max_train_steps": 1000, "stage": 2}),
        ],
    ),
    "maetok": (
        "MAETok",
        [
            ("train_maetok.py", "emoji_maetok.yaml", {"max_train_steps": 2000, "auxiliary_targets": "hog=1.0"}),
            ("train_maetok.py", "emoji_maetok.yaml", {"max_train_steps": 1000, "stage": 2, "mask_steps": 500}),
        ],
    ),
}
DENOISER, AUTOREGRESSIVE = "generator", "autoregressive"
SIT = {"norm_type": "layer_norm", "ff_type": "gelu", "use_rope": "false"}
# Generator -> its name in the table, its script and config, and its settings.
GENERATORS = {
    "mar": ("MAR", AUTOREGRESSIVE, {"model": "mar", "num_layers": 2, "num_inference_steps": 16}),
    "raster": ("RasterAR", AUTOREGRESSIVE, {"model": "raster"}),
    "random": ("RandomAR", AUTOREGRESSIVE, {"model": "random"}),
    "sit": ("SiT", DENOISER, SIT),
    "dit": ("DiT", DENOISER, {**SIT, "prediction_type": "epsilon"}),
    "lightningdit": ("LightningDiT", DENOISER, {}),
}
PIPELINES = {DENOISER: FAEDiTPipeline, AUTOREGRESSIVE: FAEMARPipeline}
RESOLUTION = 64
SAMPLES = 300
SHOWN = "detok"  # tokenizer of the saved images


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, "outputs/emoji-generators", argv)
    judge = find_judge(args.judge)
    args.data = shrink(args.data, RESOLUTION, args.output / "images")
    folder = args.output / "tokenizers"
    tokenizers = {name: train_stages(folder / name, stages, args) for name, (_, stages) in TOKENIZERS.items()}
    latents = {name: args.output / "latents" / name for name in TOKENIZERS}
    for name, tokenizer in tokenizers.items():
        cache_latents(tokenizer, latents[name], args.data, RESOLUTION)
    rfid = {name: reconstruction_fid(tokenizer, args, judge) for name, tokenizer in tokenizers.items()}

    def once(folder, seed):
        return {
            name: {
                kind: measure(folder / name / kind, kind, latents[name], seed, args=args, judge=judge)
                for kind in GENERATORS
            }
            for name in TOKENIZERS
        }

    repeat(args, once, lambda results: table(results, rfid))
    save_samples(args.output / "samples.png", args.output / "seed-0" / SHOWN)
    save_kept(args.output / "kept.png", args.output / "seed-0" / SHOWN, args.data)


def reconstruction_fid(tokenizer: Path, args, judge: str) -> float:
    """rFID of the validation images."""
    settings = {"model": tokenizer, "dataset_name": args.data, "encoder": args.encoder, "metrics": "rfid"}
    settings |= {"extractors": f"effnet={judge}"}
    return evaluate("reconstruction", tokenizer.with_name("reconstruction"), settings)["rfid_effnet"]


def measure(folder: Path, kind: str, latents: Path, seed: int, *, args, judge: str) -> float:
    """Train a generator on cached latents; `fid_effnet` of its samples, against the training images."""
    _, config, settings = GENERATORS[kind]
    settings = {"dataset_name": latents, "seed": seed, **settings}
    train(f"train_{config}.py", f"emoji_table_{config}.yaml", folder, settings, args.flags)
    return evaluate_fid(folder, args, judge, SAMPLES)


def save_samples(path: Path, folder: Path) -> None:
    """Save samples: a row per generator, a column per class."""
    images = []
    for kind, (_, config, _) in GENERATORS.items():
        pipe = PIPELINES[config].from_pretrained(folder / kind)
        images += pipe(CLASSES, generator=torch.Generator().manual_seed(0)).images
    make_grid(images, columns=len(CLASSES)).save(path)


def save_kept(path: Path, folder: Path, data: str) -> None:
    """Save validation images, their upper halves, and the completions of these by each autoregressive generator."""
    image_args = ImageArguments(dataset_name=data, label_column="subgroup")
    source = NumberedImages(image_args.open(RESOLUTION, train_split="train"))
    batch = source.read(range(0, len(source), len(source) // len(CLASSES))[: len(CLASSES)])
    images, labels = from_uint8(batch["images"]), batch["class_labels"].tolist()
    mask = torch.zeros(1, RESOLUTION, RESOLUTION)
    mask[:, RESOLUTION // 2 :] = 1
    originals = to_pil(images)
    rows = originals + to_pil(images * (1 - mask))
    for kind, (_, config, _) in GENERATORS.items():
        if config == AUTOREGRESSIVE:
            pipe = FAEMARPipeline.from_pretrained(folder / kind)
            generator = torch.Generator().manual_seed(0)
            rows += pipe(labels, image=originals, mask_image=mask, generator=generator).images
    make_grid(rows, columns=len(labels)).save(path)


def table(results: list[dict], rfid: dict[str, float]) -> str:
    """Markdown: mean and deviation of `fid_effnet` over the seeds, and the number of seeds in which l-DeTok was best.

    Args:
        rfid: of each tokenizer, in the first line.
    """
    lines = ["| | " + " | ".join(title for title, _ in TOKENIZERS.values()) + " | l-DeTok is best |"]
    lines.append("|---" * (2 + len(TOKENIZERS)) + "|")
    lines.append("| rFID of the tokenizer | " + " | ".join(spread([rfid[name]]) for name in TOKENIZERS) + " | |")
    for kind, (title, *_) in GENERATORS.items():
        cells = [spread([result[name][kind] for result in results]) for name in TOKENIZERS]
        best = sum(min(TOKENIZERS, key=lambda name: result[name][kind]) == "detok" for result in results)
        lines.append(f"| {title} | {' | '.join(cells)} | {best} of {len(results)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
