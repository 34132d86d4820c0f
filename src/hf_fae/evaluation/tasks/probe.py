"""How well latents capture image semantics: k-NN, linear probes, and the encoder's released classifier."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...images import from_uint8
from ...loading import loading
from ..inputs.numbered_images import ImageArguments, NumberedImages
from ..inputs.spaces import SPACES, decodes_features, open_any_tokenizer, token_spaces
from ..metrics.classifiers import (
    LEARNING_RATES,
    NEIGHBOURS,
    POOLINGS,
    knn_accuracy,
    linear_probe,
    pool_tokens,
    released_head_accuracy,
    standard_error,
)
from ..options import TokenizerArguments, check_positive
from ..provenance import describe_run, identify_model
from ..reports.report import Evaluation
from ..resumable import Parts, check_settings, process_state


__all__ = ["ProbeArguments", "evaluate_probe"]

# All tokens of the features are too many inputs: 256 x 1536 for DINOv2-g.
SPACE_POOLINGS = {name: POOLINGS if name == "latents" else POOLINGS[:2] for name in SPACES}


@dataclass
class ProbeArguments(TokenizerArguments):
    """The tokenizer to probe, and the classifiers trained on its features."""

    train_split: str = field(default="train", metadata={"help": "Split to train on; `split` is measured."})
    neighbours: list[int] = field(
        default_factory=lambda: list(NEIGHBOURS),
        metadata={"help": "Numbers of neighbours in k-NN; those above the number of training images are skipped."},
    )
    probe_steps: int = field(default=12_500, metadata={"help": "Steps of the linear probes."})
    probe_batch_size: int = field(default=1024, metadata={"help": "Batch size of the linear probes."})
    classifier: str | None = field(
        default=None,
        metadata={
            "help": "The encoder's released classifier (Hub id or folder; DINOv2's), with the classes of the data."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive(probe_steps=self.probe_steps, probe_batch_size=self.probe_batch_size)
        if not self.neighbours or min(self.neighbours) < 1:
            raise ValueError(f"neighbours must be positive numbers, got {self.neighbours}")


def evaluate_probe(args: ProbeArguments, image_args: ImageArguments) -> Evaluation | None:
    """Classify images from the mode of the latents and, with a frozen encoder, from its original and reconstructed
    features.

    Metrics are top-1 accuracies in [0, 1]: k-NN on mean tokens with the best k, linear probes with the best pooling
    and learning rate (latents have one more pooling, all tokens). The best are chosen on the measured images, as in
    dinov2's protocol; `details` has all of them.

    Returns:
        The result on the main process, whose report is written to `output_dir`; None on the others.

    Raises:
        ValueError: an invalid argument, before anything is written.
    """
    if image_args.label_column is None:
        raise ValueError("label_column must name the classes to tell apart, got None")
    state = process_state()
    vae = open_any_tokenizer(args, state.device)
    data = image_args.open(vae.config.sample_size, args.seed, args.train_split)
    splits = {"train": NumberedImages(data, "train"), "validation": NumberedImages(data)}
    if not len(splits["validation"]):
        raise ValueError(f"split must have images, got {image_args.split!r} with none")
    if len(splits["train"]) < min(args.neighbours):
        raise ValueError(
            f"neighbours must be at most the {len(splits['train'])} training images, got {args.neighbours}"
        )
    classifier = _open_classifier(args, vae, data)
    settings = {
        "task": "probe",
        **describe_run(args, vae.config.sample_size, state.device),
        "classifier": args.classifier and identify_model(args.classifier),
        "neighbours": args.neighbours,
        "probe_steps": args.probe_steps,
        "probe_batch_size": args.probe_batch_size,
        "learning_rates": list(LEARNING_RATES),
        "pictures": splits["validation"].describe(),
        "train_pictures": splits["train"].describe(),
    }
    check_settings(args.output_dir, settings)

    parts = {}
    for split, source in splits.items():
        parts[split] = Parts(Path(args.output_dir) / "parts" / split, len(source), args.batch_size)
        keep_class_tokens = classifier is not None and split == "validation"
        parts[split].compute(_pooler(args, vae, source, keep_class_tokens), f"features of {split}")
    if not state.is_main_process:
        return None
    spaces = SPACES if decodes_features(vae) else ("latents",)
    metrics, details = _measure(args, parts, spaces, classifier, state.device)
    count = details["samples"]["validation"]
    details["damaged"] = {split: len(source) - details["samples"][split] for split, source in splits.items()}
    details["standard_errors"] = {name: standard_error(value, count) for name, value in metrics.items()}
    result = Evaluation(
        "probe", metrics, settings, dataset=image_args.dataset_name, split=image_args.split, details=details
    )
    result.save(args.output_dir)
    return result


def _open_classifier(args, vae, data):
    """The released classifier, on the encoder's device; None without one."""
    if args.classifier is None:
        return None
    if not decodes_features(vae):
        raise ValueError(
            f"classifier must be None for a {type(vae).__name__}, which has no features, got {args.classifier!r}"
        )
    from transformers import AutoModelForImageClassification

    with loading("classifier", args.classifier):
        model, info = AutoModelForImageClassification.from_pretrained(
            args.classifier, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"classifier {args.classifier!r} must have trained weights, but lacks {missing[0]}")
    trained = (model.config.model_type, model.config.hidden_size)
    encoder = (vae.image_encoder.model.config.model_type, vae.image_encoder.hidden_size)
    if trained != encoder or not trained[0].startswith("dinov2"):
        raise ValueError(
            f"classifier {args.classifier!r} must be DINOv2's for the tokenizer's encoder, a {encoder[0]} of width "
            f"{encoder[1]}, got a {trained[0]} of width {trained[1]}"
        )
    if model.config.num_labels != len(data.id2label):
        raise ValueError(
            f"classifier {args.classifier!r} must have the {len(data.id2label)} classes of label_column "
            f"{data.args.label_column!r}, got {model.config.num_labels}"
        )
    return model.eval().to(vae.device)


def _pooler(args, vae, source, keep_class_tokens):
    """Numbers of images -> "SPACE.POOLING" and labels of the readable ones."""

    @torch.no_grad()
    def pool(images):
        spaces, grid = token_spaces(vae, images)
        pooled = {
            f"{name}.{pooling}": pool_tokens(spaces[name], grid, pooling)
            for name in spaces
            for pooling in SPACE_POOLINGS[name]
        }
        if keep_class_tokens:
            pixel_values = from_uint8(images.to(vae.device)).to(vae.dtype)
            pooled["class_tokens"] = vae.image_encoder(pixel_values, grid).pooler_output.float()
        return {name: values.cpu() for name, values in pooled.items()}

    def make_part(numbers):
        batch = source.read(numbers)
        pooled = [pool(images) for images in batch["images"].split(args.batch_size)]
        part = {name: torch.cat([found[name] for found in pooled]) for name in pooled[0]}
        part["class_labels"] = batch["class_labels"]
        return {name: values[batch["is_good"]] for name, values in part.items()}

    return make_part


def _measure(args, parts, spaces, classifier, device):
    """Metrics and details, one space in memory at a time."""
    labels = {split: part.stack("class_labels") for split, part in parts.items()}
    if not all(map(len, labels.values())):
        used = {split: len(values) for split, values in labels.items()}
        raise ValueError(f"dataset_name must have images that can be used in both splits, got {used}")
    metrics, released = {}, {}
    details = {
        "samples": {split: len(values) for split, values in labels.items()},
        "largest_class": int(labels["validation"].bincount().max()) / len(labels["validation"]),
        "knn": {},
        "linear": {},
        "chosen": {},
    }
    for name in spaces:
        poolings = SPACE_POOLINGS[name]
        train, validation = (
            {pooling: part.stack(f"{name}.{pooling}") for pooling in poolings} for part in parts.values()
        )
        knn = {
            pooling: knn_accuracy(
                train[pooling],
                labels["train"],
                validation[pooling],
                labels["validation"],
                args.neighbours,
                device=device,
            )
            for pooling in poolings
        }
        k, metrics[f"knn_{name}"] = max(knn["mean"].items(), key=lambda choice: choice[1])
        probe = linear_probe(
            train,
            labels["train"],
            validation,
            labels["validation"],
            steps=args.probe_steps,
            batch_size=args.probe_batch_size,
            seed=args.seed,
            device=device,
        )
        metrics[f"linear_{name}"] = probe.accuracy
        details["knn"][name], details["linear"][name] = knn, probe.accuracies
        details["chosen"][name] = {
            "knn": {"pooling": "mean", "k": k},
            "linear": {"pooling": probe.pooling, "learning_rate": probe.learning_rate},
        }
        if classifier is not None and name != "latents":
            class_tokens, tokens = parts["validation"].stack("class_tokens"), validation["mean"][:, None]
            released[f"released_head_{name}"] = released_head_accuracy(
                classifier, class_tokens, tokens, labels["validation"]
            )
    return metrics | released, details
