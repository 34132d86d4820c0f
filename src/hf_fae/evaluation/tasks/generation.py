"""Sample quality of a pipeline: gFID and related metrics, as ADM's evaluator defines them."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ...images import from_uint8, save_png, to_pil
from ...loading import loading
from ..inputs.extractors import INCEPTION, extract_features, load_extractors
from ..inputs.numbered_images import ImageArguments, NumberedImages
from ..inputs.panel import PANEL
from ..inputs.references import Reference, ReferenceBatch, write_batch
from ..inputs.sampling import Sampler, SamplingArguments, SavedSamples
from ..metrics.distances import clip_score
from ..reports.report import Evaluation
from ..resumable import Parts, check_settings, process_state, without_paths
from .panel_scores import PANEL_METRICS, check_panel, score_panel
from .sample_scores import METRICS, check_metrics, score_samples


__all__ = ["GenerationArguments", "evaluate_generation"]


@dataclass
class GenerationArguments(SamplingArguments):
    """The pipeline, and the reference of its samples.

    `model` may also be an npz of samples in ADM's layout, `arr_0` (N, H, W, 3) uint8.
    """

    reference: str | None = field(
        default=None, metadata={"help": "ADM's reference npz (default: the images of dataset_name)."}
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Folder in which evaluations, one at a time, share the features of a reference."},
    )
    extractors: list[str] = field(
        default_factory=lambda: [INCEPTION],
        metadata={
            "help": "Feature extractors: inception, inception=FILE, or [NAME=]PATH of a timm or transformers model; "
            f"of FDr6 and MIND6 {' '.join(PANEL)}."
        },
    )
    metrics: list[str] = field(
        default_factory=lambda: list(METRICS),
        metadata={"help": f"What to measure: {', '.join((*METRICS, *PANEL_METRICS))}."},
    )
    held_out_split: str | None = field(
        default=None,
        metadata={
            "help": "fdr and mind: split of dataset_name with real images that the reference lacks (default of fdr "
            "for ImageNet at 256 px: the published distances of its validation images)."
        },
    )
    text_model: str | None = field(
        default=None, metadata={"help": "CLIP or SigLIP (Hub id or folder) for the CLIP score of prompts."}
    )
    save_images: Literal["none", "png", "npz"] = field(
        default="none", metadata={"help": "Save the samples: as PNG files, or as an npz for ADM's own evaluator."}
    )
    dataset_id: str | None = field(
        default=None, metadata={"help": "Hub id of the data set of the reference (default: dataset_name)."}
    )

    def __post_init__(self):
        super().__post_init__()
        if unknown := sorted(set(self.metrics) - {*METRICS, *PANEL_METRICS}):
            raise ValueError(f"metrics must be among {', '.join((*METRICS, *PANEL_METRICS))}, got {unknown[0]!r}")


def evaluate_generation(args: GenerationArguments, image_args: ImageArguments) -> Evaluation | None:
    """Generate from classes, or from the captions of a data set, and compare the samples with a reference.

    Args:
        args: the pipeline and the protocol.
        images: the reference, where that is no npz; and the prompts, where the pipeline reads text.

    Returns:
        The result on the main process, whose report is written to `output_dir`; None on the others.

    Raises:
        ValueError: an invalid argument, before anything is written.
    """
    state = process_state()
    sampler = (SavedSamples if args.model.endswith(".npz") else Sampler)(args, image_args, state.device)
    source = _open_reference(args, sampler, image_args)
    extractors = load_extractors(args.extractors, state.device)
    held_out = _open_held_out(args, sampler, image_args, source)
    dataset = args.dataset_id or image_args.dataset_name or args.reference
    check_metrics(args.metrics, extractors, len(source))
    check_panel(args.metrics, extractors, held_out and len(held_out), dataset, sampler.resolution)
    text_model = _open_text_model(args, sampler, state.device)
    settings = {
        **sampler.settings,
        "extractors": {extractor.name: extractor.settings for extractor in extractors},
        "text_model": text_model and text_model.settings,
        "reference": source.describe(),
        "held_out": held_out and held_out.describe(),
        "metrics": sorted(args.metrics),
        "save_images": args.save_images,
    }
    folder = Path(args.output_dir)
    reference = Reference(source, extractors, _reference_folder(args, sampler, settings), args.batch_size)
    if held_out is not None:
        held_out = Reference(held_out, extractors, folder / "parts" / "held_out", args.batch_size)
    check_settings(folder, {"task": "generation", **settings})

    reference.compute()
    if held_out is not None:
        held_out.compute()
    samples = Parts(folder / "parts" / "samples", sampler.count, args.batch_size)

    def make_part(numbers):
        images = sampler.sample_images(numbers)
        part = extract_features(extractors, images)
        if args.save_images == "npz":
            part["images"] = images.permute(0, 2, 3, 1)
        elif args.save_images == "png":
            _save_pngs(images, numbers, folder / "images")
        if text_model is not None:
            part["image_embeds"] = text_model.image_embeds(images).cpu()
            part["text_embeds"] = text_model.text_embeds(sampler.prompts(numbers)).cpu()
        return part

    samples.compute(make_part, "sampling")
    if not state.is_main_process:
        return None
    if args.save_images == "npz":
        write_batch(folder / "samples.npz", samples, "images")
    metrics, details = score_panel(samples, reference, held_out, extractors, args.metrics)
    for extractor in extractors:
        metrics |= score_samples(samples, reference, extractor, args.metrics)
    if text_model is not None:
        embeds = samples.stack("image_embeds"), samples.stack("text_embeds")
        metrics[f"clip_score_{text_model.name}"] = clip_score(*embeds)
    details |= {"damaged": {"prompts": sampler.corrupt, "reference": reference.count_corrupt(extractors[0])}}
    split = image_args.split if args.reference is None else None
    result = Evaluation("generation", metrics, settings, dataset=dataset, split=split, details=details)
    result.save(folder)
    return result


def _open_reference(args, sampler, image_args):
    if args.reference is None:
        return sampler.data or NumberedImages(image_args.open(sampler.resolution, args.seed))
    if sampler.data is None and image_args.dataset_name is not None and args.held_out_split is None:
        raise ValueError(f"dataset_name must be None where a reference is given, got {image_args.dataset_name!r}")
    batch = ReferenceBatch(args.reference)
    if batch.shape is not None and batch.shape[1:3] != 2 * (sampler.resolution,):
        raise ValueError(
            f"reference {args.reference!r} must have images of {sampler.resolution} x {sampler.resolution} as "
            f"{args.model!r} generates them, got {batch.shape[1]} x {batch.shape[2]}"
        )
    return batch


def _open_held_out(args, sampler, image_args, source):
    """The held-out images; None without any."""
    if args.held_out_split is None:
        return None
    held_out = NumberedImages(replace(image_args, split=args.held_out_split).open(sampler.resolution, args.seed))
    if isinstance(source, NumberedImages) and held_out.fingerprint == source.fingerprint:
        raise ValueError(f"held_out_split must differ from split, got {args.held_out_split!r} for both")
    return held_out


def _reference_folder(args, sampler, settings):
    if args.reference_cache is None:
        return Path(args.output_dir, "parts", "reference")
    seen = {name: settings[name] for name in ("reference", "extractors")}
    seen |= {"resolution": sampler.resolution, "batch_size": args.batch_size}
    folder = Path(args.reference_cache, hashlib.sha256(json.dumps(without_paths(seen)).encode()).hexdigest()[:16])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"reference_cache {args.reference_cache!r} cannot be used: {error}") from error
    return folder


def _open_text_model(args, sampler, device):
    if args.text_model is None:
        return None
    if sampler.data is None:
        raise ValueError(f"text_model requires prompts, got {args.text_model!r}")
    from ..inputs.text_models import ImageTextModel

    with loading("text_model", args.text_model):
        return ImageTextModel.from_pretrained(args.text_model).to(device)


def _save_pngs(images, numbers, folder):
    folder.mkdir(exist_ok=True)
    for number, image in zip(numbers, to_pil(from_uint8(images)), strict=True):
        save_png(image, folder / f"{number:06d}.png")
