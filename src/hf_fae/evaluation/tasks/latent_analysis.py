"""How hard latents are to model: mixture modes, spectra, moments and denoising loss, next to pixels and a PCA."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ...autoencoders.pixel_tokenizer import PixelTokenizer
from ...images import from_uint8
from ...latents import encode_images
from ...utils.atomic import atomic_write
from ..inputs.numbered_images import ImageArguments, NumberedImages
from ..inputs.spaces import decodes_features, open_any_tokenizer
from ..metrics.denoising_loss import denoising_loss
from ..metrics.latent_space import channel_moments, mode_count_curve, power_spectrum, reduce_spaces
from ..options import TokenizerArguments, check_positive
from ..provenance import describe_run
from ..reports.plots import plot_channels, plot_denoising, plot_likelihoods, plot_spectra
from ..reports.report import Evaluation
from ..resumable import Parts, check_settings, process_state


__all__ = ["LatentsArguments", "choose_rows", "evaluate_latents", "pixel_patches"]

PCA_IMAGES = 512  # their tokens define the principal components


@dataclass
class LatentsArguments(TokenizerArguments):
    """The tokenizer whose latents are analysed, and the models fitted to them."""

    train_split: str = field(default="train", metadata={"help": "Split to fit on; `split` is held out."})
    max_train_samples: int = field(
        default=100_000,
        metadata={"help": "Fit on a fixed random subset of N rows; with label_column, balanced over the classes."},
    )
    components: list[int] = field(
        default_factory=lambda: [5, 10, 50, 100, 200, 300], metadata={"help": "Numbers of Gaussians in the mixtures."}
    )
    covariance_type: Literal["full", "tied", "diag", "spherical"] = field(
        default="full", metadata={"help": "Covariances of the mixtures."}
    )
    max_dimension: int | None = field(
        default=None,
        metadata={"help": "Maximum number of principal components (default: explaining nine tenths of every space)."},
    )
    denoising_steps: int = field(
        default=0, metadata={"help": "Train a small denoiser on every space for N steps (0: none)."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive(max_train_samples=self.max_train_samples, max_dimension=self.max_dimension)
        if not self.components or min(self.components) < 1:
            raise ValueError(f"components must be positive numbers, got {self.components}")
        self.components = sorted(set(self.components))
        if self.denoising_steps < 0:
            raise ValueError(f"denoising_steps must not be negative, got {self.denoising_steps}")


def evaluate_latents(args: LatentsArguments, image_args: ImageArguments) -> Evaluation | None:
    """Compare a tokenizer's latents with untrained representations of the same dimension.

    "latents" are the posterior modes; "pixels" the image, downsampled by area so that each cell of the latent grid
    (for a pixel tokenizer, of the patch grid) holds about as many numbers (`pixel_patches`); "features_pca" the tokens
    of the encoder, if there is one, projected to as many principal components as latents have channels. Mixtures are
    fitted to whole images, reduced by PCA to one dimension for all spaces and standardised (MAETok's protocol); all
    other metrics use the spaces as they are. `nll` is that of the largest mixture, `held_out_nll` the minimum over all
    mixtures, in nats per dimension.

    Returns:
        The result on the main process, whose report is written to `output_dir`; None on the others.

    Raises:
        ValueError: an invalid argument, before anything is written.
    """
    state = process_state()
    vae = open_any_tokenizer(args, state.device)
    data = image_args.open(vae.config.sample_size, args.seed, train_split=args.train_split)
    held_out, train = NumberedImages(data), NumberedImages(data, "train")
    train = train.select(choose_rows(train.rows, image_args.label_column, args.max_train_samples, args.seed))
    if len(train) < max(2, *args.components):
        raise ValueError(f"components must be at most the {len(train)} training images, got {args.components}")
    settings = {
        "task": "latents",
        **describe_run(args, vae.config.sample_size, state.device),
        "pictures": held_out.describe(),
        "train_pictures": train.describe(),
        "components": args.components,
        "covariance_type": args.covariance_type,
        "max_dimension": args.max_dimension,
        "denoising_steps": args.denoising_steps,
    }
    check_settings(args.output_dir, settings)

    folder = Path(args.output_dir)
    axes = _feature_axes(args, vae, train, folder / "parts") if decodes_features(vae) else None
    parts = {}
    for name, part in (("train", train), ("held_out", held_out)):
        parts[name] = Parts(folder / "parts" / name, len(part), args.batch_size)
        parts[name].compute(
            lambda numbers, part=part: _make_spaces(args, vae, axes, part.read(numbers)), f"encoding {name}"
        )
    if not state.is_main_process:
        return None
    compared = ["latents", "pixels"] + (["features_pca"] if decodes_features(vae) else [])
    spaces = {part: {name: parts[part].stack(name) for name in compared} for part in parts}
    metrics, details = _analyse(args, spaces, folder, state.device)
    details["damaged"] = {
        "train": len(train) - len(spaces["train"]["latents"]),
        "held_out": len(held_out) - len(spaces["held_out"]["latents"]),
    }
    result = Evaluation(
        "latents", metrics, settings, dataset=image_args.dataset_name, split=image_args.split, details=details
    )
    result.save(folder)
    return result


def pixel_patches(images: torch.Tensor, grid: tuple[int, int], channels: int) -> torch.Tensor:
    """Images (B, 3, H, W), downsampled by area, as (B, 3 p^2, h, w): p x p pixels in each cell of a grid (h, w).

    p brings 3 p^2 nearest to `channels`.
    """
    sides = range(1, channels + 1)
    side = min(sides, key=lambda side: (abs(3 * side**2 - channels), side))
    small = F.interpolate(images.float(), size=(grid[0] * side, grid[1] * side), mode="area")
    return F.pixel_unshuffle(small, side)


def choose_rows(rows, label_column, count, seed):
    """Indices of `count` random rows, balanced over the classes if there are labels."""
    order = np.random.default_rng(seed).permutation(len(rows))
    if label_column is not None and count < len(rows):
        seen, turns = {}, []
        labels = rows.select_columns([label_column])[:][label_column]
        for number in order:
            turns.append(seen.setdefault(labels[number], 0))
            seen[labels[number]] += 1
        order = order[np.argsort(turns, kind="stable")]
    return sorted(order[:count].tolist())


def _feature_axes(args, vae, train, folder):
    """Mean (C,) and principal axes (C, latent channels) of the encoder's tokens."""
    state = process_state()
    count = min(len(train), PCA_IMAGES)
    parts = Parts(folder / "moments", count, args.batch_size)

    def make_part(numbers):
        batch = train.read([number * len(train) // count for number in numbers])  # spread over a sorted data set
        features, _ = _encode(args, vae, batch["images"])
        tokens = features[batch["is_good"]].flatten(0, 1).double()
        return {
            "sum": tokens.sum(0)[None],
            "products": (tokens.T @ tokens)[None],
            "count": torch.tensor([len(tokens)]),
        }

    parts.compute(make_part, "principal components")
    path = folder / "axes.safetensors"
    if state.is_main_process and not path.exists():  # by one process: signs of eigenvectors are arbitrary
        count, total, products = (sum(parts.iterate(name)).double() for name in ("count", "sum", "products"))
        mean = (total / count)[0]
        axes = torch.linalg.eigh((products / count)[0] - torch.outer(mean, mean))[1].flip(1)
        axes = axes[:, : vae.latents_mean.shape[0]]
        save_file({"mean": mean.contiguous(), "axes": axes.contiguous()}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    state.wait_for_everyone()
    return load_file(path)


@torch.no_grad()
def _encode(args, vae, images):
    """Features (B, N, C), None without an encoder, and the modes of the latents (B, c, h, w), on the CPU."""
    features, latents = [], []
    for batch in images.split(args.batch_size):
        pixel_values = from_uint8(batch.to(vae.device)).to(vae.dtype)
        if decodes_features(vae):
            tokens, grid = vae.extract_features(pixel_values)
            features.append(vae.last_features(tokens).float().cpu())
            latents.append(vae.encode_features(tokens, grid).latent_dist.mode().float().cpu())
        else:
            latents.append(encode_images(vae, pixel_values).mode().float().cpu())
    return torch.cat(features) if features else None, torch.cat(latents)


def _make_spaces(args, vae, axes, batch):
    """The compared spaces, (B, C, h, w) each."""
    features, latents = _encode(args, vae, batch["images"])
    # 1-D latents have no spatial grid: pixels are grouped by the tokenizer's patches.
    grid = vae.grid if isinstance(vae, PixelTokenizer) else tuple(latents.shape[2:])
    channels = max(1, round(latents[0].numel() / (grid[0] * grid[1])))
    spaces = {"latents": latents, "pixels": pixel_patches(from_uint8(batch["images"]), grid, channels)}
    if features is not None:
        projected = ((features.double() - axes["mean"]) @ axes["axes"]).float()
        spaces["features_pca"] = projected.mT.unflatten(2, tuple(latents.shape[2:]))
    return {name: values[batch["is_good"]] for name, values in spaces.items()}


def _analyse(args, spaces, folder, device):
    """Metrics and details; writes the plots."""
    train, held_out = spaces["train"], spaces["held_out"]
    reduced = reduce_spaces(train, held_out, max_dimension=args.max_dimension)
    spectra = {name: power_spectrum(held_out[name]) for name in train}
    moments = {name: channel_moments(train[name]) for name in train}
    curves, losses = {}, {}
    for name in train:
        curves[name] = _cached(
            folder / "parts" / f"mixtures_{name}.json",
            lambda name=name: mode_count_curve(
                reduced.train[name], reduced.held_out[name], args.components, args.covariance_type, seed=args.seed
            ),
        )
        if args.denoising_steps:
            losses[name] = _cached(
                folder / "parts" / f"denoising_{name}.json",
                lambda name=name: asdict(
                    denoising_loss(train[name], held_out[name], args.denoising_steps, seed=args.seed, device=device)
                ),
            )
    plot_likelihoods(curves, reduced.dimension).savefig(folder / "nll.png")
    plot_spectra(spectra, reduced).savefig(folder / "spectrum.png")
    plot_channels(train, moments).savefig(folder / "channels.png")
    if losses:
        plot_denoising(losses).savefig(folder / "denoising.png")

    metrics = {}
    for name in train:
        metrics[f"nll_{name}"] = curves[name][-1]["nll"] / reduced.dimension
        metrics[f"held_out_nll_{name}"] = min(point["held_out_nll"] for point in curves[name]) / reduced.dimension
        metrics[f"effective_rank_{name}"] = moments[name]["effective_rank"]
        if losses:
            metrics[f"denoising_loss_{name}"] = losses[name]["loss"]
    orders = {
        kind: {
            str(count): sorted(train, key=lambda name: curves[name][place][kind])
            for place, count in enumerate(args.components)
        }
        for kind in ("nll", "held_out_nll")
    }
    if losses:
        orders["denoising_loss"] = sorted(train, key=lambda name: losses[name]["loss"])
    return metrics, {
        "shapes": {name: list(values.shape[1:]) for name, values in train.items()},
        "dimension": reduced.dimension,
        "explained_variance": reduced.shares,
        "mixtures": curves,
        "spectra": spectra,
        "channels": moments,
        "denoising": losses,
        "easiest_first": orders,
    }


def _cached(path, compute):
    """An expensive JSON-able result: computed once, then read."""
    if not path.exists():
        atomic_write(path, json.dumps(compute()))
    return json.loads(path.read_text())
