"""Pictures to judge by their numbers: drawn by a pipeline, or before.

Picture number i has a label or prompt and noise of its own, whatever is drawn beside it: the same pictures come out on
any number of processes.
"""

import dataclasses
import inspect
import json
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ...images import to_uint8
from ...latents import check_finite, decode_latents
from ...loading import complete_text_encoder, loading
from ...pipelines.latent_pipeline import LatentPipeline
from ...utils.randomness import mix_seed
from ..options import DTYPES, EvaluationArguments, check_positive
from ..reports.report import describe_run
from .numbered_images import NumberedPictures, PictureArguments
from .references import ReferenceBatch


__all__ = ["Sampler", "SamplingArguments", "SavedSamples"]


@dataclass
class SamplingArguments(EvaluationArguments):
    """Which pictures to draw, and how."""

    text_encoder: str | None = field(
        default=None, metadata={"help": "Text encoder (Hub id or folder) of a pipeline that comes without it."}
    )
    num_samples: int = field(default=50_000, metadata={"help": "Pictures to draw."})
    labels: Literal["balanced", "random"] = field(
        default="balanced", metadata={"help": "Classes: in turn, so that each has as many pictures, or at random."}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "None: the pipeline's own."})
    guidance_scale: str | None = field(
        default=None, metadata={"help": "A number, or in JSON what the pipeline takes; none: the pipeline's own."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive(num_inference_steps=self.num_inference_steps)
        if self.num_samples < 10:
            raise ValueError(f"num_samples must be at least 10, got {self.num_samples}")


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

    def __init__(self, args: SamplingArguments, pictures: PictureArguments, device: torch.device):
        self.args, self.pipe, self.data, self.damaged = args, _open_pipeline(args), None, 0
        complete_text_encoder(self.pipe, args.text_encoder)
        self.pipe.to(device)
        height, self.resolution = self.pipe.image_size
        if height != self.resolution:
            raise ValueError(f"model {args.model!r} must draw squares, got pictures of {height} x {self.resolution}")
        self.count = args.num_samples
        if self.pipe.reads_text:
            if pictures.caption_column is None:
                raise ValueError("caption_column must name the prompts of a pipeline that reads text, got None")
            self.data = NumberedPictures(pictures.open(self.resolution, args.seed))
            captions = self.data.captions()
            self.damaged, self.count = len(self.data) - len(captions), min(self.count, len(captions))
            if self.count < 10:
                raise ValueError(
                    f"caption_column {pictures.caption_column!r} must hold at least 10 texts, got {self.count}"
                )
            order = np.random.default_rng(args.seed).permutation(len(captions))[: self.count]
            self._prompts = [captions[place] for place in order]
        self.call = self._call_arguments()
        scheduler = getattr(self.pipe, "scheduler", None)
        self.settings = {
            **describe_run(args, self.resolution, device),
            "num_samples": self.count,
            "labels": args.labels if self.data is None else None,
            "prompts": self.data and self.data.describe(),
            "text_encoder": args.text_encoder,
            "scheduler": scheduler and {"class": type(scheduler).__name__, **_plain(scheduler.config)},
            **self.call,
            "guidance_scale": dataclasses.asdict(self.call["guidance_scale"]),
        }

    def draw(self, numbers: range) -> torch.Tensor:
        """(B, 3, H, W) uint8 on the CPU, `batch_size` at a time.

        Raises:
            ValueError: pictures that are not finite.
        """
        images = []
        for start in range(numbers.start, numbers.stop, self.args.batch_size):
            batch = range(start, min(start + self.args.batch_size, numbers.stop))
            generators = [torch.Generator().manual_seed(mix_seed(self.args.seed, number)) for number in batch]
            wanted = self.labels(batch) if self.data is None else self.prompts(batch)
            latents = self.pipe(wanted, generator=generators, output_type="latent", **self.call).images
            with torch.no_grad():
                sample = decode_latents(self.pipe.vae, latents)
            check_finite(f"pictures that {self.args.model!r} draws", sample)
            images.append(to_uint8(sample).cpu())
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
        # Of the diffusion heads of autoregressive models; the pipeline's own, named so that the report has them.
        heads = [name for name in ("num_diffusion_steps", "temperature") if name in accepted]
        return call | {name: self.pipe.config[name] for name in heads}


class SavedSamples:
    """Pictures that were drawn before; attributes and methods as those of `Sampler`."""

    def __init__(self, args: SamplingArguments, pictures: PictureArguments, device: torch.device):
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


def _parse(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"guidance_scale must be a number or JSON, got {text!r}") from error


def _plain(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}
