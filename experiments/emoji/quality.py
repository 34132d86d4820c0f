"""Sample quality of pipelines on Fluent Emoji: a table, a sweep of guidance and steps, neighbours, prompts.

    python experiments/emoji/quality.py table --model fae=outputs/emoji256/dit vae=outputs/emoji256/vae-dit \
        --data ../shared/assets/fluent-emoji --judges ../shared/assets --output outputs/emoji256/quality
    python experiments/emoji/quality.py sweep --model fae=outputs/emoji256/dit ...
    python experiments/emoji/quality.py nearest --model fae=outputs/emoji256/dit ...
    python experiments/emoji/quality.py prompts --model mmdit=outputs/emoji256/9-text ...

Samples have the labels of random training images and are compared with the training images, by `fid_effnet` (Fréchet
distance of EfficientNet-Lite0's pooled features) and `kid_dinov2` (kernel distance of DINOv2-small's class tokens).
These are not FID and KID: compare them within one table only. Features of the training images are cached in `output`.
`prompts` is for text-to-image models, all other tasks for class-conditional ones.
"""

import argparse
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from samples import read_images, sample_latents
from torch.nn import functional as F
from tqdm import tqdm

from hf_fae import AutoencoderFAE
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.evaluation.inputs.extractors import extract_features, load_extractors
from hf_fae.evaluation.metrics.distances import GaussianStatistics, frechet_distance, kernel_distance
from hf_fae.images import from_uint8, make_grid, to_pil, to_uint8
from hf_fae.latents import decode_latents, encode_images
from hf_fae.loading import complete_text_encoder


BATCH = 50
EFFNET, DINO = "effnet.features", "dinov2.features"


class TrainingDistances:
    """Distances to the training images, in the features of EfficientNet-Lite0 and DINOv2-small."""

    def __init__(self, folder: Path, data: ImageData, output: Path, count: int | None = None):
        self.effnet = load_extractors([f"effnet={folder / 'efficientnet-lite0'}"])
        self.dino = load_extractors([f"dinov2={folder / 'dinov2-small'}"])
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
        self.data, self.rows = data, rows.sort().values.tolist()
        self.path = output / f"training-features-{len(rows)}.safetensors"

    @cached_property
    def training(self) -> dict[str, torch.Tensor]:
        """Features of the training images, computed once."""
        if not self.path.exists():
            extractors, starts = [*self.effnet, *self.dino], range(0, len(self.rows), BATCH)
            batches = (self.rows[start : start + BATCH] for start in tqdm(starts, desc="training images"))
            parts = [extract_features(extractors, to_uint8(read_images(self.data, rows))) for rows in batches]
            save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, self.path)
        return load_file(self.path)

    @cached_property
    def statistics(self) -> GaussianStatistics:
        return GaussianStatistics.of([self.training[EFFNET]])

    def fid(self, images: torch.Tensor) -> float:
        samples = GaussianStatistics.of([extract_features(self.effnet, images)[EFFNET]])
        return frechet_distance(samples, self.statistics)

    def directions(self, images: torch.Tensor) -> torch.Tensor:
        """DINOv2's class tokens (B, C), of unit length."""
        return F.normalize(extract_features(self.dino, images)[DINO], dim=1)

    def kid(self, images: torch.Tensor) -> float:
        return kernel_distance(extract_features(self.dino, images)[DINO], self.training[DINO])[0]


@torch.no_grad()
def sample(pipe, conditions: list[int] | list[str], precision: str, **options) -> torch.Tensor:
    """8-bit samples (N, 3, H, W) of classes or prompts; the seed of a sample is its number."""
    latents = sample_latents(pipe, conditions, BATCH, precision, **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return torch.cat([to_uint8(decode_latents(pipe.vae, part)) for part in latents.split(BATCH)])


@torch.no_grad()
def reconstruct(vae, images: torch.Tensor) -> torch.Tensor:
    """8-bit reconstructions (N, 3, H, W), from posterior modes, of images in [-1, 1]."""
    return torch.cat([to_uint8(decode_latents(vae, encode_images(vae, part).mode())) for part in images.split(BATCH)])


def open_pipeline(path: str):
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def table(args, distances, data, labels) -> None:
    """The distances of validation images and, for each model, of their reconstructions and of its samples."""

    def line(name, images):
        print(f"| {name} | {distances.fid(images):.1f} | {distances.kid(images):.4f} |", flush=True)

    print("| images | `fid_effnet` | `kid_dinov2` |\n|---|---|---|")
    validation = torch.cat([batch["pixel_values"] for batch in data.validation_batches(BATCH)])
    line("validation images", to_uint8(validation))
    for name, path in args.model:
        pipe = open_pipeline(path)
        if isinstance(pipe.vae, AutoencoderFAE) and pipe.vae.image_encoder is None:
            pipe.vae.load_encoder(args.judges / "dinov2-small")
        line(f"{name}: validation images reconstructed", reconstruct(pipe.vae, validation))
        line(f"{name}: samples", sample(pipe, labels, args.mixed_precision))


def sweep(args, distances, data, labels) -> None:
    """`fid_effnet` by guidance scale and by steps, each with the pipeline's default of the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, path in args.model:
        pipe, found = open_pipeline(path), {}
        default = {"guidance_scale": pipe.config.guidance_scale}
        if "num_inference_steps" in pipe.config:
            default["num_inference_steps"] = pipe.config.num_inference_steps
        for axis, key, values in zip(axes, ("guidance_scale", "num_inference_steps"), (args.scales, args.steps)):
            if key not in default:
                continue
            for value in values:
                found[f"{key} {value}"] = distances.fid(
                    sample(pipe, labels, args.mixed_precision, **{**default, key: value})
                )
                print(f"{name} {key} {value}: {found[f'{key} {value}']:.1f}", flush=True)
            axis.plot(values, [found[f"{key} {value}"] for value in values], "o-", label=name)
            axis.set(xlabel=key.replace("_", " "), ylabel="fid_effnet")
        (args.output / f"sweep-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    axes[1].set_xscale("log")
    axes[1].set_xticks(args.steps, args.steps)
    axes[1].minorticks_off()
    axes[0].legend()
    figure.savefig(args.output / "sweep.png", dpi=100)


def nearest(args, distances, data, labels) -> None:
    """Each sample next to its nearest training image in DINOv2's features, and their cosine.

    Validation images give the reference: cosines of unseen images, and how often the nearest image has the same class.
    """
    training = F.normalize(distances.training[DINO], dim=1)
    classes = torch.tensor([data.reader.class_label(data.train[row]) for row in distances.rows])

    def find(images, labels):
        similarity, nearest = (distances.directions(images) @ training.T).max(1)
        return similarity, nearest.tolist(), (classes[nearest] == torch.as_tensor(labels)).float().mean()

    batches = list(data.validation_batches(BATCH))
    validation = to_uint8(torch.cat([batch["pixel_values"] for batch in batches]))
    known, _, same = find(validation, torch.cat([batch["class_labels"] for batch in batches]))
    print("| images | cosine to the nearest (median) | nearer than 95 % of validation images | same class |")
    print(f"|---|---|---|---|\n| validation images | {known.median():.3f} | 5.0 % | {same:.1%} |", flush=True)
    for name, path in args.model:
        pipe = open_pipeline(path)
        images = sample(pipe, labels, args.mixed_precision)
        similarity, nearest, same = find(images, labels)
        near = (similarity > known.quantile(0.95)).float().mean()
        print(f"| {name} | {similarity.median():.3f} | {near:.1%} | {same:.1%} |", flush=True)
        shown = range(args.shown)
        matches = to_uint8(read_images(data, [distances.rows[nearest[i]] for i in shown]))
        pairs = [image for i in shown for image in (images[i], matches[i])]
        texts = [text for i in shown for text in (pipe.id2label[labels[i]], f"nearest: {similarity[i]:.2f}")]
        sheet = make_grid(to_pil(from_uint8(torch.stack(pairs))), columns=8, labels=texts)
        sheet.quantize(256).save(args.output / f"nearest-{name}.png", optimize=True)


def prompts(args, distances, data, labels) -> None:
    """Whether samples of held-out captions have the right group, by the nearest validation image in DINOv2's features.

    One sample for each emoji of the validation split, regardless of skin tone. The emoji themselves, compared with all
    others, are the upper reference; chance is the group of a random validation image.
    """
    settings = {"label_column": "group", "caption_column": "caption", "balance_column": "base"}
    data = ImageData(replace(data.args, **settings), data.seed)
    rows = list({row["base"]: row for row in data.rows("validation")[1]}.values())
    examples = [data.example(row) for row in rows]
    groups = torch.tensor([example["class_labels"] for example in examples])
    captions = [example["captions"] for example in examples]
    real = distances.directions(to_uint8(torch.stack([example["pixel_values"] for example in examples])))

    def line(name, similarity):
        print(f"| {name} | {(groups[similarity.argmax(1)] == groups).float().mean():.1%} |", flush=True)

    chance = (groups[:, None] == groups).float().mean()
    print(f"| images of {len(rows)} captions | nearest image has the right group |\n|---|---|")
    print(f"| chance | {chance:.1%} |")
    line("the emoji themselves", (real @ real.T).fill_diagonal_(-1))
    for name, path in args.model:
        pipe = open_pipeline(path)
        complete_text_encoder(pipe, args.text_encoder)
        images = sample(pipe, captions, args.mixed_precision)
        line(name, distances.directions(images) @ real.T)
        shown = range(0, len(rows), -(-len(rows) // args.shown))
        sheet = make_grid(to_pil(from_uint8(images[list(shown)])), labels=[captions[i] for i in shown])
        sheet.quantize(256).save(args.output / f"prompts-{name}.png", optimize=True)


def named_path(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    return name, path


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", type=named_path, nargs="+", required=True, metavar="NAME=PATH", help="pipelines")
    parser.add_argument("--data", required=True, help="Fluent Emoji: a folder or a Hub id")
    parser.add_argument("--judges", type=Path, required=True, help="folder of efficientnet-lite0 and dinov2-small")
    parser.add_argument("--output", type=Path, required=True, help="folder of features and images")
    parser.add_argument(
        "--text_encoder", help="prompts: text encoder of pipelines saved without it (folder or Hub id)"
    )
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--training_samples", type=int, help="training images to compare with (default: all)")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="of sampling")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 25, 50, 100])
    parser.add_argument("--shown", type=int, default=20, help="number of samples in the saved grids")
    return parser.parse_args(argv)


TASKS = {"table": table, "sweep": sweep, "nearest": nearest, "prompts": prompts}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    resolution = open_pipeline(args.model[0][1]).vae.config.sample_size
    data = ImageData(
        DataArguments(args.data, label_column="subgroup", resolution=resolution, max_validation_samples=333)
    )
    chosen = torch.randint(len(data), (args.samples,), generator=torch.Generator().manual_seed(0))
    labels = [data.reader.class_label(data.train[row]) for row in chosen.tolist()]
    TASKS[args.task](args, TrainingDistances(args.judges, data, args.output, args.training_samples), data, labels)


if __name__ == "__main__":
    main()
