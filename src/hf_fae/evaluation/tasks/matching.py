"""Patch similarity in latents and reconstructed features: similarity maps and matches, compared with the encoder's."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ...utils.image_metrics import token_cosine
from ..inputs.numbered_images import ImageArguments, NumberedImages
from ..inputs.spaces import SPACES, open_feature_tokenizer, token_spaces
from ..metrics.patch_similarity import (
    choose_query,
    is_near,
    map_agreement,
    match_patches,
    nearest_patches,
    object_mask,
    similarity_map,
)
from ..options import TokenizerArguments
from ..provenance import describe_run
from ..reports.report import Evaluation
from ..reports.sheets import plot_matches, plot_similarity
from ..resumable import Parts, check_settings, process_state


__all__ = ["MatchingArguments", "evaluate_matching"]

COMPARED = SPACES[1:]  # each compared with the features
PERCENTILES = (1, 5, 50)


@dataclass
class MatchingArguments(TokenizerArguments):
    """The tokenizer, and the images to plot."""

    rows: list[int] = field(
        default_factory=lambda: list(range(8)),
        metadata={
            "help": "Numbers of the images to plot; patches are matched between the first and the second, the third "
            "and the fourth, and so on."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.rows or len(self.rows) % 2:
            raise ValueError(f"rows must be pairs of images, got {self.rows}")


def evaluate_matching(args: MatchingArguments, image_args: ImageArguments) -> Evaluation | None:
    """Compare patch similarity in the encoder's features, in the reconstructed features, and in the latents.

    Over all images: the cosine of each token with its original, and the correlation of the similarity maps of all
    patches with those of the features. Over the pairs of `rows`: the share of object patches of the first image whose
    nearest neighbour in the second is the same patch as in the features, or one next to it. Objects are segmented in
    the features of all `rows` (`object_mask`). Plots: `similarity.png` and `matches.png`.

    Returns:
        The result on the main process, whose report is written to `output_dir`; None on the others.

    Raises:
        ValueError: an invalid argument, before anything is written.
    """
    state = process_state()
    vae = open_feature_tokenizer(args, state.device)
    data = NumberedImages(image_args.open(vae.config.sample_size, args.seed))
    if outside := [row for row in args.rows if not 0 <= row < len(data)]:
        raise ValueError(f"rows must be from 0 to {len(data) - 1}, got {outside[0]}")
    shown = data.read(args.rows)
    if not shown["is_good"].all():
        raise ValueError(f"rows must be images that can be read, got {args.rows[shown['is_good'].int().argmin()]}")
    settings = {
        "task": "matching",
        **describe_run(args, vae.config.sample_size, state.device),
        "rows": args.rows,
        "pictures": data.describe(),
    }
    check_settings(args.output_dir, settings)

    def make_part(numbers):
        batch = data.read(numbers)
        measured = [_measure(vae, images) for images in batch["images"].split(args.batch_size)]
        return {name: torch.cat([part[name] for part in measured])[batch["is_good"]] for name in measured[0]}

    folder = Path(args.output_dir)
    parts = Parts(folder / "parts" / "images", len(data), args.batch_size)
    parts.compute(make_part, "comparing patches")
    if not state.is_main_process:
        return None
    cosines = parts.stack("token_cosine").double()
    if not len(cosines):
        raise ValueError(f"dataset_name {image_args.dataset_name!r} must have images that can be read, got none")
    metrics = {"token_cosine": cosines.mean().item()}
    for percentile, value in zip(PERCENTILES, np.percentile(cosines.numpy(), PERCENTILES), strict=True):
        metrics[f"token_cosine_p{percentile}"] = float(value)
    for name in COMPARED:
        metrics[f"map_correlation_{name}"] = parts.stack(name).double().mean().item()

    images = shown["images"]
    batches = [token_spaces(vae, batch) for batch in images.split(args.batch_size)]
    grid = batches[0][1]
    tokens = {name: torch.cat([spaces[name] for spaces, _ in batches]).cpu() for name in SPACES}
    masks = object_mask(tokens["features"], grid, args.seed)
    masks = masks | ~masks.any(1, keepdim=True)  # without an object, the whole image counts
    captions = shown.get("captions", [""] * len(images))
    labels = [f"{row} {caption}".strip() for row, caption in zip(args.rows, captions, strict=True)]

    queries = [choose_query(*image) for image in zip(tokens["features"], masks, strict=True)]
    maps = {name: torch.stack(list(map(similarity_map, tokens[name], queries))) for name in SPACES}
    shown_cosines = token_cosine(tokens["reconstruction"], tokens["features"])
    plot_similarity(images, queries, maps, shown_cosines, grid=grid, labels=labels).savefig(folder / "similarity.png")

    pairs = [_match(tokens, masks, first, grid[1]) for first in range(0, len(images), 2)]
    plot_matches(images, masks, [pair["matches"] for pair in pairs], grid, labels).savefig(folder / "matches.png")
    for name in COMPARED:
        metrics[f"match_agreement_{name}"] = torch.cat([pair["alike"][name] for pair in pairs]).double().mean().item()
    details = {
        "damaged": len(data) - len(cosines),
        "grid": list(grid),
        "pictures": [
            {"row": row, "query": query, "object_patches": int(mask.sum())}
            for row, query, mask in zip(args.rows, queries, masks, strict=True)
        ],
        "pairs": [
            {name: pair["alike"][name].double().mean().item() for name in COMPARED} | {"by_chance": pair["by_chance"]}
            for pair in pairs
        ],
    }
    result = Evaluation(
        "matching", metrics, settings, dataset=image_args.dataset_name, split=image_args.split, details=details
    )
    result.save(folder)
    return result


def _measure(vae, images):
    """Per token: cosine with the original, and correlation of similarity maps between spaces."""
    spaces, _ = token_spaces(vae, images)
    measured = {name: map_agreement(spaces[name], spaces["features"]) for name in COMPARED}
    measured["token_cosine"] = token_cosine(spaces["reconstruction"], spaces["features"])
    return {name: values.cpu() for name, values in measured.items()}


def _match(tokens, masks, first, width):
    """Nearest neighbours of the object patches of an image, in the next image.

    Returns:
        "alike": space -> whether a patch has the same neighbour as in the features, or one next to that.
        "by_chance": the expected share if neighbours were random object patches.
        "matches": space -> pairs (16, 2) of the patches that match best in the features, and which of them are alike.
    """
    second = first + 1
    nearest = {name: nearest_patches(space[first], space[second], masks[second])[1] for name, space in tokens.items()}
    alike = {name: is_near(indices, nearest["features"], width) for name, indices in nearest.items()}
    candidates = masks[second].nonzero().squeeze(1)
    near = is_near(nearest["features"][masks[first], None], candidates, width)
    shown = match_patches(*tokens["features"][first : second + 1], *masks[first : second + 1])[0][:, 0]
    return {
        "alike": {name: alike[name][masks[first]] for name in COMPARED},
        "by_chance": near.double().mean().item(),
        "matches": {name: (torch.stack([shown, nearest[name][shown]], dim=1), alike[name][shown]) for name in tokens},
    }
