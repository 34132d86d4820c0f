"""How good are the pictures that a pipeline draws? gFID and its companions, as ADM's evaluator defines them.

Picture number i has a label or prompt and noise of its own, whatever is drawn beside it: the same pictures come out on
any number of processes.
"""

import dataclasses
import inspect
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ...images import to_pil, to_uint8
from ...latents import decode_latents
from ...loading import loading
from ...pipelines.latent_pipeline import LatentPipeline
from ...training.randomness import mix_seed
from ..arguments import DTYPES, EvaluationArguments, check_positive
from ..distances import clip_score
from ..extractors import INCEPTION, judge, load_extractors
from ..parts import Parts, check_settings, process_state
from ..pictures import NumberedPictures, PictureArguments
from ..references import Reference, ReferenceBatch, write_batch
from ..report import Evaluation, describe_run
from ..scores import METRICS, check_metrics, score_samples


__all__ = ["GenerationArguments", "evaluate_generation"]


@dataclass
class GenerationArguments(EvaluationArguments):
    """Which pipeline to draw with, and what to compare its pictures with.

    In place of a pipeline `model` may be an npz of pictures drawn before, `arr_0` (N, H, W, 3) uint8 as ADM has it.
    """

    reference: str | None = field(
        default=None, metadata={"help": "ADM's reference npz; none: the pictures of dataset_name."}
    )
    extractors: list[str] = field(
        default_factory=lambda: [INCEPTION],
        metadata={"help": "Judges: inception, inception=FILE, or [NAME=]PATH of a timm or transformers model."},
    )
    metrics: list[str] = field(
        default_factory=lambda: list(METRICS), metadata={"help": f"What to measure: {', '.join(METRICS)}."}
    )
    num_samples: int = field(default=50_000, metadata={"help": "Pictures to draw."})
    labels: Literal["balanced", "random"] = field(
        default="balanced", metadata={"help": "Classes: in turn, so that each has as many pictures, or at random."}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "None: the pipeline's own."})
    guidance_scale: str | None = field(
        default=None, metadata={"help": "A number, or in JSON what the pipeline takes; none: the pipeline's own."}
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
        check_positive(num_inference_steps=self.num_inference_steps)
        if unknown := sorted(set(self.metrics) - set(METRICS)):
            raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {unknown[0]!r}")
        if self.num_samples < 10:
            raise ValueError(f"num_samples must be at least 10, got {self.num_samples}")


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
    reference = Reference(source, extractors, folder / "parts" / "reference", args.batch_size)
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


class Sampler:
    """Pictures by their numbers, as a pipeline draws them.

    Attributes:
        count: pictures in all: as many as are wanted, and no more than there are prompts.
        damaged: rows of the data without a prompt, which are left out.
        resolution: their side.
        data: the prompts, and pictures with them; None for a pipeline of classes.
        settings: what the pictures depend on, JSON-able.

    Raises:
        ValueError: no pipeline here, or an argument that does not fit it.
    """

    def __init__(self, args: GenerationArguments, pictures: PictureArguments, device: torch.device):
        self.args, self.pipe, self.data, self.damaged = args, _open_pipeline(args), None, 0
        self.pipe.to(device)
        config = self.pipe.transformer.config
        if not isinstance(config.sample_size, int):
            raise ValueError(f"model {args.model!r} must draw squares, got latents of {config.sample_size}")
        self.resolution, self.count = config.sample_size * self.pipe.vae_scale_factor, args.num_samples
        if config.num_classes is None:
            if pictures.caption_column is None:
                raise ValueError("caption_column must name the prompts of a pipeline that reads text, got None")
            self.data = NumberedPictures(pictures.open(self.resolution, args.seed))
            captions = self.data.rows.select_columns([pictures.caption_column])[:][pictures.caption_column]
            usable = [caption.strip() for caption in captions if isinstance(caption, str) and caption.strip()]
            self.damaged, self.count = len(captions) - len(usable), min(self.count, len(usable))
            if self.count < 10:
                raise ValueError(
                    f"caption_column {pictures.caption_column!r} must hold at least 10 texts, got {self.count}"
                )
            order = np.random.default_rng(args.seed).permutation(len(usable))[: self.count]
            self._prompts = [usable[place] for place in order]
        self.call = self._call_arguments()
        scheduler = getattr(self.pipe, "scheduler", None)
        self.settings = {
            **describe_run(args, self.resolution, device),
            "num_samples": self.count,
            "labels": args.labels if self.data is None else None,
            "prompts": self.data and self.data.describe(),
            "scheduler": scheduler and {"class": type(scheduler).__name__, **_plain(scheduler.config)},
            **self.call,
            "guidance_scale": dataclasses.asdict(self.call["guidance_scale"]),
        }

    def draw(self, numbers: range) -> torch.Tensor:
        """(B, 3, H, W) uint8 on the CPU, `batch_size` at a time."""
        images = []
        for start in range(numbers.start, numbers.stop, self.args.batch_size):
            batch = range(start, min(start + self.args.batch_size, numbers.stop))
            generators = [torch.Generator().manual_seed(mix_seed(self.args.seed, number)) for number in batch]
            wanted = self.labels(batch) if self.data is None else self.prompts(batch)
            latents = self.pipe(wanted, generator=generators, output_type="latent", **self.call).images
            with torch.no_grad():
                images.append(to_uint8(decode_latents(self.pipe.vae, latents)).cpu())
        return torch.cat(images)

    def labels(self, numbers: range) -> list[int]:
        """Class ids: in turn, so that any run of numbers has them all alike, or each at random."""
        classes = self.pipe.transformer.config.num_classes
        if self.args.labels == "balanced":
            return [number % classes for number in numbers]
        return [mix_seed(self.args.seed, number, 1) % classes for number in numbers]

    def prompts(self, numbers: range) -> list[str]:
        """Captions of the data set, in random order: a fixed choice where there are more than pictures to draw."""
        return self._prompts[numbers.start : numbers.stop]

    def _call_arguments(self):
        args, accepted = self.args, inspect.signature(self.pipe.__call__).parameters
        scale = self.pipe.config.guidance_scale if args.guidance_scale is None else _parse(args.guidance_scale)
        try:
            call = {"guidance_scale": type(self.pipe.guidance).of(scale)}
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"guidance_scale must be what a {type(self.pipe).__name__} takes, got {scale!r}"
            ) from error
        if "num_inference_steps" in accepted:
            call["num_inference_steps"] = args.num_inference_steps or self.pipe.config.num_inference_steps
        elif args.num_inference_steps is not None:
            raise ValueError(
                f"num_inference_steps has no meaning for a {type(self.pipe).__name__}, got {args.num_inference_steps}"
            )
        return call


class SavedSamples:
    """Pictures that were drawn before; attributes and methods as those of `Sampler`."""

    def __init__(self, args: GenerationArguments, pictures: PictureArguments, device: torch.device):
        for name in ("guidance_scale", "num_inference_steps"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name} has no meaning for pictures drawn before, got {getattr(args, name)!r}")
        self.batch, self.data, self.damaged = ReferenceBatch(args.model, "model"), None, 0
        self.count = min(args.num_samples, len(self.batch))
        if self.count < 10:
            raise ValueError(f"model {args.model!r} must hold at least 10 pictures, got {self.count}")
        _, self.resolution, width, _ = self.batch.shape
        if width != self.resolution:
            raise ValueError(f"model {args.model!r} must hold squares, got {self.resolution} x {width}")
        model = {"path": args.model, "sha256": self.batch.sha256}
        self.settings = {"model": model, "resolution": self.resolution, "num_samples": self.count}
        self.settings["batch_size"] = args.batch_size  # which the parts depend on

    def draw(self, numbers: range) -> torch.Tensor:
        return self.batch.read(numbers)["images"]


def _open_pipeline(args):
    with loading("model", args.model):
        pipe = DiffusionPipeline.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    if not isinstance(pipe, LatentPipeline):
        raise ValueError(f"model {args.model!r} must be a pipeline of hf_fae, got a {type(pipe).__name__}")
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def _open_text_model(args, sampler, device):
    if args.text_model is None:
        return None
    if sampler.data is None:
        raise ValueError(f"text_model has no meaning without prompts, got {args.text_model!r}")
    from ..retrieval import ImageTextModel

    with loading("text_model", args.text_model):
        return ImageTextModel.from_pretrained(args.text_model).to(device)


def _parse(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"guidance_scale must be a number or JSON, got {text!r}") from error


def _plain(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _save_pngs(images, numbers, folder):
    folder.mkdir(exist_ok=True)
    for number, picture in zip(numbers, to_pil(images.float() / 127.5 - 1), strict=True):
        picture.save(folder / f"{number:06d}.png")
