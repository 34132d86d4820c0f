"""How good are the pictures that a pipeline draws? gFID and its companions, as ADM's evaluator defines them."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...images import from_uint8, to_pil
from ...loading import loading
from ..inputs.extractors import INCEPTION, judge, load_extractors
from ..inputs.numbered_images import NumberedPictures, PictureArguments
from ..inputs.references import Reference, ReferenceBatch, write_batch
from ..inputs.sampling import Sampler, SamplingArguments, SavedSamples
from ..metrics.distances import clip_score
from ..metrics.scores import METRICS, check_metrics, score_samples
from ..parts import Parts, check_settings, process_state, without_places
from ..reports.report import Evaluation


__all__ = ["GenerationArguments", "evaluate_generation"]


@dataclass
class GenerationArguments(SamplingArguments):
    """Which pipeline to draw with, and what to compare its pictures with.

    In place of a pipeline `model` may be an npz of pictures drawn before, `arr_0` (N, H, W, 3) uint8 as ADM has it.
    """

    reference: str | None = field(
        default=None, metadata={"help": "ADM's reference npz; none: the pictures of dataset_name."}
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Folder in which evaluations, one at a time, share judges' features of a reference."},
    )
    extractors: list[str] = field(
        default_factory=lambda: [INCEPTION],
        metadata={"help": "Judges: inception, inception=FILE, or [NAME=]PATH of a timm or transformers model."},
    )
    metrics: list[str] = field(
        default_factory=lambda: list(METRICS), metadata={"help": f"What to measure: {', '.join(METRICS)}."}
    )
    text_model: str | None = field(
        default=None, metadata={"help": "CLIP or SigLIP (Hub id or folder) for the CLIP score of prompts."}
    )
    save_images: Literal["none", "png", "npz"] = field(
        default="none", metadata={"help": "Keep the pictures: as files, or as an npz for ADM's own evaluator."}
    )
    dataset_id: str | None = field(
        default=None, metadata={"help": "Hub id of the data set that the reference stands for; none: dataset_name."}
    )

    def __post_init__(self):
        super().__post_init__()
        if unknown := sorted(set(self.metrics) - set(METRICS)):
            raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {unknown[0]!r}")


def evaluate_generation(args: GenerationArguments, pictures: PictureArguments) -> Evaluation | None:
    """Draw pictures of classes, or of a data set's captions, and compare them with a reference.

    Args:
        args: pipeline and protocol.
        pictures: the reference, where that is no npz; and the prompts, where the pipeline reads text.

    Returns:
        On the main process the result, whose report lies in `output_dir`; None on others.

    Raises:
        ValueError: an argument that does not fit, before anything is written.
    """
    state = process_state()
    sampler = (SavedSamples if args.model.endswith(".npz") else Sampler)(args, pictures, state.device)
    source = _open_reference(args, sampler, pictures)
    extractors = load_extractors(args.extractors, state.device)
    check_metrics(args.metrics, extractors, len(source))
    text_model = _open_text_model(args, sampler, state.device)
    settings = {
        **sampler.settings,
        "extractors": {extractor.name: extractor.settings for extractor in extractors},
        "text_model": text_model and text_model.settings,
        "reference": source.describe(),
        "metrics": sorted(args.metrics),
        "save_images": args.save_images,
    }
    folder = Path(args.output_dir)
    reference = Reference(source, extractors, _reference_folder(args, sampler, settings), args.batch_size)
    check_settings(folder, {"task": "generation", **settings})

    reference.compute()
    samples = Parts(folder / "parts" / "samples", sampler.count, args.batch_size)

    def make_part(numbers):
        images = sampler.draw(numbers)
        part = judge(extractors, images)
        if args.save_images == "npz":
            part["images"] = images.permute(0, 2, 3, 1)
        elif args.save_images == "png":
            _save_pngs(images, numbers, folder / "images")
        if text_model is not None:
            part["image_embeds"] = text_model.image_embeds(images).cpu()
            part["text_embeds"] = text_model.text_embeds(sampler.prompts(numbers)).cpu()
        return part

    samples.compute(make_part, "drawing")
    if not state.is_main_process:
        return None
    if args.save_images == "npz":
        write_batch(folder / "samples.npz", samples, "images")
    metrics = {}
    for extractor in extractors:
        metrics |= score_samples(samples, reference, extractor, args.metrics)
    if text_model is not None:
        embeds = samples.stack("image_embeds"), samples.stack("text_embeds")
        metrics[f"clip_score_{text_model.name}"] = clip_score(*embeds)
    dataset = args.dataset_id or pictures.dataset_name or args.reference
    details = {"damaged": {"prompts": sampler.damaged, "reference": reference.damaged(extractors[0])}}
    split = pictures.split if args.reference is None else None
    result = Evaluation("generation", metrics, settings, dataset, split, details)
    result.save(folder)
    return result


def _open_reference(args, sampler, pictures):
    if args.reference is None:
        return sampler.data or NumberedPictures(pictures.open(sampler.resolution, args.seed))
    if sampler.data is None and pictures.dataset_name is not None:
        raise ValueError(f"dataset_name must be None where a reference is given, got {pictures.dataset_name!r}")
    batch = ReferenceBatch(args.reference)
    if batch.shape is not None and batch.shape[1:3] != 2 * (sampler.resolution,):
        raise ValueError(
            f"reference {args.reference!r} must have pictures of {sampler.resolution} x {sampler.resolution} as "
            f"{args.model!r} draws them, got {batch.shape[1]} x {batch.shape[2]}"
        )
    return batch


def _reference_folder(args, sampler, settings):
    if args.reference_cache is None:
        return Path(args.output_dir, "parts", "reference")
    seen = {name: settings[name] for name in ("reference", "extractors")}
    seen |= {"resolution": sampler.resolution, "batch_size": args.batch_size}
    folder = Path(args.reference_cache, hashlib.sha256(json.dumps(without_places(seen)).encode()).hexdigest()[:16])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"reference_cache {args.reference_cache!r} cannot be used: {error}") from error
    return folder


def _open_text_model(args, sampler, device):
    if args.text_model is None:
        return None
    if sampler.data is None:
        raise ValueError(f"text_model has no meaning without prompts, got {args.text_model!r}")
    from ..metrics.image_text import ImageTextModel

    with loading("text_model", args.text_model):
        return ImageTextModel.from_pretrained(args.text_model).to(device)


def _save_pngs(images, numbers, folder):
    folder.mkdir(exist_ok=True)
    for number, picture in zip(numbers, to_pil(from_uint8(images)), strict=True):
        picture.save(folder / f"{number:06d}.png")
