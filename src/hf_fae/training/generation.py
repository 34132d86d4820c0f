"""What the trainings of generators share: data, tokenizer, text encoder, a pipeline to go on from, the run."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from torch import nn

from ..data.captions import CAPTION_LENGTH, CaptionEncoder, load_caption_encoder
from ..data.conditions import open_condition
from ..data.images import DataArguments, ImageData
from ..data.latent_cache import CachedLatents, is_latent_cache
from ..generators.mar import MARTransformer2DModel
from ..images import make_grid
from ..latents import LatentAutoencoderMixin
from ..latents import latent_size as vae_latent_size
from ..loading import complete_text_encoder
from ..objectives.ddpm import DiffusionObjective
from ..objectives.flow_matching import FlowMatchingObjective
from ..objectives.generator import GeneratorObjective
from ..objectives.starflow import STARFlowObjective
from ..objectives.token_diffusion import AutoregressiveObjective, MARObjective
from ..pipelines.fae_mar import FAEMARPipeline
from ..pipelines.fae_starflow import FAEStarFlowPipeline
from ..pipelines.latent_pipeline import LatentPipeline
from ..utils.randomness import ImageRandom
from .arguments import LoopArguments
from .loop import TrainingLoop
from .tokenizer import complete_tokenizer, load_tokenizer


__all__ = [
    "CaptionArguments",
    "GeneratorArguments",
    "GeneratorValidation",
    "class_names",
    "latent_size",
    "load_trained_pipeline",
    "objective_of",
    "open_caption_encoder",
    "open_data",
    "open_tokenizer",
    "open_pipeline",
    "save_without_encoder",
    "train_generator",
]


@dataclass
class GeneratorArguments:
    """Where a generator starts from, and how it is looked at; what all kinds of generators have."""

    vae: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer of hf_fae or AutoencoderKL (Hub id or folder); none: that of the latent cache or "
            "pipeline."
        },
    )
    image_encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), where the tokenizer comes without it."}
    )
    pipeline: str | None = field(
        default=None,
        metadata={"help": "Pipeline to train on (Hub id or folder), instead of a new one of the shape below."},
    )
    label_dropout: float = field(
        default=0.1, metadata={"help": "Share of labels or captions replaced by the null class or the empty text."}
    )
    grid_images: int = field(
        default=16, metadata={"help": "Pictures of a validation, spread over the classes or its captions."}
    )


@dataclass
class CaptionArguments(GeneratorArguments):
    """The same of generators that read texts."""

    text_encoder: str | None = field(
        default=None,
        metadata={"help": "Text encoder (Hub id or folder); none: that of the latent cache or pipeline."},
    )
    max_caption_length: int | None = field(
        default=None,
        metadata={"help": f"Tokens of a caption; none: as the latent cache has them, else {CAPTION_LENGTH}."},
    )


def train_generator(
    args: GeneratorArguments,
    data_args: DataArguments,
    loop_args: LoopArguments,
    config: dict,
    pipeline_class: type[LatentPipeline],
    new_pipeline: Callable[[ImageData | CachedLatents], LatentPipeline],
    make_objective: Callable[[LatentPipeline, nn.Module], GeneratorObjective],
    text_encoder: str | None = None,
    **draw,
) -> None:
    """Train a generator, from its arguments to the saved pipeline.

    Args:
        args, data_args, loop_args, config: as `parse_arguments` gives them.
        pipeline_class: what `args.pipeline` has to be.
        new_pipeline: makes one for the data, where there is none to train on.
        make_objective: what trains its transformer, given the pipeline and its condition.
        text_encoder: Hub id or folder, for a pipeline to train on that reads texts and comes without.
        draw: arguments of the calls that draw for validations.

    Raises:
        ValueError: an argument that does not fit, before anything is written.
    """
    loop = TrainingLoop(loop_args, config)
    with loop.accelerator.main_process_first():
        data = open_data(data_args, loop_args.seed)
        if args.pipeline is None:
            pipeline = new_pipeline(data)
            pipeline.set_progress_bar_config(disable=True)
        else:
            pipeline = open_pipeline(args.pipeline, pipeline_class, args.vae, args.image_encoder, data, text_encoder)
    loop.print(data.describe())
    data, condition = open_condition(pipeline, data)
    loop.print(condition.describe())
    # Of the pipeline what trains and draws: a text encoder that nobody asks stays where it is.
    objective = make_objective(pipeline, condition).to(loop.device)
    batches = list(data.validation_batches(loop_args.train_batch_size))
    validate = GeneratorValidation(pipeline, objective, batches, args.grid_images, loop_args.seed, **draw)
    loop.run(objective, data, validate, save=lambda: save_without_encoder(pipeline, loop_args.output_dir))


def open_data(args: DataArguments, seed: int) -> ImageData | CachedLatents:
    """The latents or the pictures that `dataset_name` names."""
    if is_latent_cache(args.dataset_name):
        return CachedLatents.from_arguments(args, seed)
    return ImageData(args, seed)


def class_names(data: ImageData | CachedLatents) -> dict[int, str]:
    """The classes of the data, for a new generator.

    Raises:
        ValueError: pictures or latents without classes.
    """
    if data.id2label is None and isinstance(data, CachedLatents):
        raise ValueError(f"dataset_name must have classes, but the latents in {str(data.folder)!r} have none")
    if data.id2label is None:
        raise ValueError("label_column must name the column of the classes, got None")
    return data.id2label


def open_caption_encoder(path: str | None, max_length: int | None, data: ImageData | CachedLatents) -> CaptionEncoder:
    """The text encoder of a new generator, in fp32.

    Args:
        path, max_length: Hub id or folder, and tokens of a caption; None for those of the latent cache.

    Raises:
        ValueError: no text encoder is named for captions that none has read, or `max_length` is not positive.
    """
    cached = (isinstance(data, CachedLatents) and data.text_encoder) or {"source": None, "max_length": CAPTION_LENGTH}
    path = path or cached["source"]
    if path is None:
        raise ValueError("text_encoder must name what reads the captions, got None")
    return load_caption_encoder(path, cached["max_length"] if max_length is None else max_length)


def open_tokenizer(
    path: str | None, image_encoder: str | None, data: ImageData | CachedLatents
) -> LatentAutoencoderMixin | AutoencoderKL:
    """The tokenizer of a new generator, in fp32; with its frozen encoder where pictures are to be encoded.

    Args:
        path: Hub id or folder; None for that of the latent cache.
        image_encoder: as in `complete_tokenizer`.

    Raises:
        ValueError: no tokenizer is named for pictures, or it does not fit them; or the latents are of another one.
    """
    if isinstance(data, CachedLatents):
        vae = load_tokenizer(str(path or data.folder / "tokenizer"), image_encoder=None)
        data.check_tokenizer(vae)
        return vae
    if path is None:
        raise ValueError("vae must name the tokenizer for training on pictures, got None")
    vae = load_tokenizer(path)
    complete_tokenizer(vae, image_encoder, data.args.resolution)
    return vae


def latent_size(vae: LatentAutoencoderMixin | AutoencoderKL, data: ImageData | CachedLatents) -> int | list[int]:
    """The side of the data's latents, or their [height, width] where they are not square."""
    if isinstance(data, CachedLatents):
        height, width = data.shape[-2:]
    else:
        height, width = vae_latent_size(vae, data.args.resolution, data.args.resolution)
    return height if height == width else [height, width]


def load_trained_pipeline(path: str, pipeline_class: type[LatentPipeline] = LatentPipeline) -> LatentPipeline:
    """A pipeline in fp32, silent.

    Args:
        path: Hub id or folder.
        pipeline_class: what it has to be.

    Raises:
        ValueError: it is another one.
    """
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    if not isinstance(pipeline, pipeline_class):
        raise ValueError(f"pipeline {path!r} must be a {pipeline_class.__name__}, got a {type(pipeline).__name__}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_pipeline(
    path: str,
    pipeline_class: type[LatentPipeline],
    vae: str | None,
    image_encoder: str | None,
    data: ImageData | CachedLatents,
    text_encoder: str | None = None,
) -> LatentPipeline:
    """The pipeline to train on, with its own tokenizer, which has to fit the data.

    Args:
        vae: must be None: the pipeline has one.
        text_encoder: as in `loading.complete_text_encoder`.

    The others are as in `load_trained_pipeline` and `open_tokenizer`.
    """
    if vae is not None:
        raise ValueError(f"vae must be None with pipeline, which has its own tokenizer, got {vae!r}")
    pipeline = load_trained_pipeline(path, pipeline_class)
    complete_text_encoder(pipeline, text_encoder)
    if isinstance(data, CachedLatents):
        data.check_tokenizer(pipeline.vae)
    else:
        complete_tokenizer(pipeline.vae, image_encoder, data.args.resolution)
    return pipeline


def objective_of(
    pipeline: LatentPipeline, condition: nn.Module, label_dropout: float, base_weight: float = 1.0, **flow_matching
) -> GeneratorObjective:
    """What trains the generator of a pipeline, with the settings that the pipeline was saved with.

    Args:
        condition, label_dropout, base_weight: as `GeneratorObjective`.
        flow_matching: further arguments of a `FlowMatchingObjective`.
    """
    common = {"label_dropout": label_dropout, "condition": condition}
    if isinstance(pipeline, FAEStarFlowPipeline):
        return STARFlowObjective(pipeline.transformer, pipeline.vae, **common)
    if isinstance(pipeline, FAEMARPipeline):
        is_masked = isinstance(pipeline.transformer, MARTransformer2DModel)
        objective = MARObjective if is_masked else AutoregressiveObjective
        return objective(pipeline.transformer, pipeline.vae, pipeline.scheduler, **common)
    common["base_weight"] = base_weight
    if isinstance(pipeline.scheduler, DDPMScheduler):
        return DiffusionObjective(pipeline.transformer, pipeline.vae, pipeline.scheduler, **common)
    # The scheduler's shift is 1 / s of the objective's.
    shift = 1 / pipeline.scheduler.config.shift
    return FlowMatchingObjective(pipeline.transformer, pipeline.vae, shift, **common, **flow_matching)


def save_without_encoder(pipeline: LatentPipeline, folder: str) -> None:
    """Save a pipeline without its tokenizer's frozen encoder, which drawing does not need."""
    if hasattr(pipeline.vae, "image_encoder"):
        pipeline.vae.image_encoder = None
    pipeline.save_pretrained(folder)


class GeneratorValidation:
    """Samples of what is trained and, where there are batches for it, the loss; the same noise every time.

    Args:
        pipeline, objective: what draws, and what gives the loss and whatever other numbers.
        batches: of the validation split; empty where there is none.
        grid_images: pictures in all, spread over the classes or the captions.
        seed: of all noise.
        examples: batches whose captions are drawn, of a pipeline that reads texts; by default those of validation.
        draw: further arguments of the pipeline's call.
    """

    def __init__(
        self,
        pipeline: LatentPipeline,
        objective: GeneratorObjective,
        batches: list[dict],
        grid_images: int,
        seed: int,
        examples: list[dict] | None = None,
        **draw,
    ):
        self.pipeline, self.objective, self.batches, self.seed = pipeline, objective, batches, seed
        self.drawn, prompts = objective.condition.prompts(batches if examples is None else examples, grid_images)
        self.draw = {**prompts, **draw}

    def __call__(self, step: int) -> dict:
        generator = torch.Generator().manual_seed(self.seed)
        pictures = self.pipeline(generator=generator, **self.draw).images
        device, sums, count = self.pipeline.device, {}, 0
        for batch in self.batches:
            batch = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
            size = len(batch["row_ids"])
            for name, value in self.objective(batch, ImageRandom(self.seed, count, device)).items():
                if value.ndim == 0:  # the others are tables of the training's log
                    sums[name] = sums.get(name, 0.0) + value.item() * size
            count += size
        means = {name: total / count for name, total in sums.items()}
        return {"samples": make_grid(pictures, labels=self.drawn), "prompts": self.drawn, **means}
