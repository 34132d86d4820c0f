"""Image-text retrieval with original and reconstructed features: recall at 1, 5 and 10, both ways."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...loading import loading
from ..inputs.numbered_images import ImageArguments, NumberedImages
from ..inputs.spaces import SPACES, open_feature_tokenizer, token_spaces
from ..inputs.text_models import ImageTextModel, load_text_model
from ..metrics.classifiers import standard_error
from ..metrics.image_text import LinearTextAlignment, pair_up, recall_at_k
from ..options import TokenizerArguments
from ..provenance import describe_run
from ..reports.report import Evaluation
from ..resumable import Parts, check_settings, process_state


__all__ = ["RetrievalArguments", "evaluate_retrieval"]

RANKS = (1, 5, 10)


@dataclass
class RetrievalArguments(TokenizerArguments):
    """The tokenizer, and the model that embeds captions."""

    text_model: str = field(
        kw_only=True,
        metadata={
            "help": "Hub id or folder: SigLIP, if its vision tower is the tokenizer's encoder; for other encoders a "
            "sentence encoder (all-MiniLM), to whose embeddings a linear map is fitted."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to fit the linear map on, if one is used."})


def evaluate_retrieval(args: RetrievalArguments, image_args: ImageArguments) -> Evaluation | None:
    """Retrieve images by caption and captions by image, from original and reconstructed features.

    With SigLIP, its own head pools original and reconstructed features (table 4 of the paper); latents have no head.
    With a sentence encoder, a linear map from mean features to caption embeddings is fitted on `train_split` and
    applied unchanged to reconstructed features; latents have a map of their own.

    Recalls are fractions in [0, 1]. Identical images and identical captions count once (see `pair_up`).

    Returns:
        The result on the main process, whose report is written to `output_dir`; None on the others.

    Raises:
        ValueError: an invalid argument, before anything is written.
    """
    if image_args.caption_column is None:
        raise ValueError("caption_column must name the captions to find, got None")
    state = process_state()
    vae = open_feature_tokenizer(args, state.device)
    with loading("text_model", args.text_model):
        text_model = load_text_model(args.text_model).to(state.device)
    is_joint = isinstance(text_model, ImageTextModel)
    if is_joint:
        _check_tower(args, text_model, vae)
    data = image_args.open(vae.config.sample_size, args.seed, None if is_joint else args.train_split)
    splits = {"validation": NumberedImages(data)} | ({} if is_joint else {"train": NumberedImages(data, "train")})
    for split, source in splits.items():
        if len(source) < 2:
            raise ValueError(f"dataset_name must have at least 2 images in each split, got {len(source)} in {split}")
    settings = {
        "task": "retrieval",
        **describe_run(args, vae.config.sample_size, state.device),
        "text_model": text_model.settings,
        "pictures": splits["validation"].describe(),
        "train_pictures": None if is_joint else splits["train"].describe(),
    }
    check_settings(args.output_dir, settings)

    parts = {}
    for split, source in splits.items():
        parts[split] = Parts(Path(args.output_dir) / "parts" / split, len(source), args.batch_size)
        parts[split].compute(_embedder(args, vae, text_model, source), f"embedding {split}")
    if not state.is_main_process:
        return None
    if not all(len(part.stack("captions")) for part in parts.values()):
        raise ValueError(f"dataset_name {image_args.dataset_name!r} must have images with captions that can be read")
    metrics, details = _measure(parts, is_joint)
    details["damaged"] = {split: len(source) - len(parts[split].stack("captions")) for split, source in splits.items()}
    result = Evaluation(
        "retrieval", metrics, settings, dataset=image_args.dataset_name, split=image_args.split, details=details
    )
    result.save(args.output_dir)
    return result


def _check_tower(args, text_model, vae):
    """Require an image-text model whose vision tower is the tokenizer's encoder."""
    tower, own = (encoder.model.state_dict() for encoder in (text_model.encoder, vae.image_encoder))
    is_same = own.keys() <= tower.keys() and all(
        values.shape == tower[name].shape and torch.equal(values, tower[name].to(values.dtype))
        for name, values in own.items()
    )
    if not is_same:
        raise ValueError(
            f"text_model {args.text_model!r} must have the tokenizer's encoder as its vision tower: for an encoder "
            "without a text tower, use a sentence encoder"
        )
    text_model.pool(torch.zeros(1, 1, vae.config.feature_dim))  # raises for models without a head


def _embedder(args, vae, text_model, source):
    """Numbers of images -> their embedding in every space, their captions' embeddings, and hashes of both."""
    pool, names = (text_model.pool, SPACES[:2]) if isinstance(text_model, ImageTextModel) else (_mean, SPACES)

    def make_part(numbers):
        batch = source.read(numbers)
        found = [token_spaces(vae, images)[0] for images in batch["images"].split(args.batch_size)]
        part = {name: torch.cat([pool(spaces[name]).cpu() for spaces in found]) for name in names}
        part["text_embeds"] = text_model.text_embeds(batch["captions"]).cpu()
        part["images"] = torch.tensor([_hash(image.numpy().tobytes()) for image in batch["images"]])
        part["captions"] = torch.tensor([_hash(caption.encode()) for caption in batch["captions"]])
        return {name: values[batch["is_good"]] for name, values in part.items()}

    return make_part


def _mean(tokens):
    return tokens.mean(1)


def _hash(data):
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big", signed=True)


def _measure(parts, is_joint):
    validation = parts["validation"]
    (image_rows, image_groups), (text_rows, text_groups) = pair_up(
        validation.stack("images"), validation.stack("captions")
    )
    texts, maps = validation.stack("text_embeds")[text_rows], {}
    if not is_joint:
        targets = parts["train"].stack("text_embeds")
        maps = {name: LinearTextAlignment(parts["train"].stack(name), targets) for name in ("features", "latents")}
        maps["reconstruction"] = maps["features"]
    metrics, errors = {}, {}
    for name in SPACES[:2] if is_joint else SPACES:
        image_embeds, text_embeds = validation.stack(name)[image_rows], texts
        if not is_joint:
            image_embeds, text_embeds = maps[name].image_embeds(image_embeds), maps[name].text_embeds(texts)
        similarity = text_embeds @ image_embeds.T
        ways = {
            "text_to_image": (similarity, text_groups, image_groups),
            "image_to_text": (similarity.T, image_groups, text_groups),
        }
        for way, ranking in ways.items():
            for k, recall in recall_at_k(*ranking, RANKS).items():
                metrics[f"{way}_r{k}_{name}"] = recall
                errors[f"{way}_r{k}_{name}"] = standard_error(recall, len(ranking[1]))
    details = {
        "pictures": len(image_rows),
        "captions": len(text_rows),
        "groups": len(torch.cat([image_groups, text_groups]).unique()),
        "penalties": {name: alignment.penalty for name, alignment in maps.items()},
        "standard_errors": errors,
    }
    return metrics, details
