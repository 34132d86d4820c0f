"""What the trainings of generators share: data, tokenizer, a pipeline to go on from, its classes, the run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline

from ..generators.mar import MARTransformer2DModel
from ..images import make_grid
from ..latents import LatentAutoencoderMixin
from ..latents import latent_size as vae_latent_size
from ..pipelines.fae_mar import FAEMARPipeline
from ..pipelines.fae_starflow import FAEStarFlowPipeline
from ..pipelines.latent_pipeline import LatentPipeline
from .arguments import LoopArguments
from .autoregression import AutoregressiveObjective, MARObjective
from .data import DataArguments, ImageData
from .diffusion import DiffusionObjective
from .generator_objectives import FlowMatchingObjective, GeneratorObjective, STARFlowObjective
from .latent_cache import CachedLatents, is_latent_cache
from .loop import TrainingLoop
from .randomness import ImageRandom
from .tokenizer import complete_tokenizer, load_tokenizer


__all__ = [
    "ClassData",
    "GeneratorArguments",
    "GeneratorValidation",
    "describe_classes",
    "latent_size",
    "load_trained_pipeline",
    "match_classes",
    "objective_of",
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
    label_dropout: float = field(default=0.1, metadata={"help": "Share of labels replaced by the null class."})
    grid_images: int = field(default=16, metadata={"help": "Pictures of a validation, spread over the classes."})


def train_generator(
    args: GeneratorArguments,
    data_args: DataArguments,
    loop_args: LoopArguments,
    config: dict,
    pipeline_class: type[LatentPipeline],
    new_pipeline: Callable[[ImageData | CachedLatents], LatentPipeline],
    make_objective: Callable[[LatentPipeline], GeneratorObjective],
    **draw,
) -> None:
    """Train a class-conditional generator, from its arguments to the saved pipeline.

    Args:
        args, data_args, loop_args, config: as `parse_arguments` gives them.
        pipeline_class: what `args.pipeline` has to be.
        new_pipeline: makes one for the data, where there is none to train on.
        make_objective: what trains its transformer.
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
            pipeline = open_pipeline(args.pipeline, pipeline_class, args.vae, args.image_encoder, data)
    loop.print(data.describe())
    data, names, new_classes = match_classes(pipeline, data)
    loop.print(describe_classes(names, new_classes))
    pipeline.to(loop.device)
    objective = make_objective(pipeline)
    batches = list(data.validation_batches(loop_args.train_batch_size))
    validate = GeneratorValidation(pipeline, objective, batches, names, args.grid_images, loop_args.seed, **draw)
    loop.run(objective, data, validate, save=lambda: save_without_encoder(pipeline, loop_args.output_dir))


def open_data(args: DataArguments, seed: int) -> ImageData | CachedLatents:
    """The latents or the pictures that `dataset_name` names.

    Raises:
        ValueError: pictures or latents without classes.
    """
    if is_latent_cache(args.dataset_name):
        latents = CachedLatents.from_arguments(args, seed)
        if latents.id2label is None:
            raise ValueError(f"dataset_name must have classes, but the latents in {args.dataset_name!r} have none")
        return latents
    if args.label_column is None:
        raise ValueError("label_column must name the column of the classes, got None")
    return ImageData(args, seed)


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
) -> LatentPipeline:
    """The pipeline to train on, with its own tokenizer, which has to fit the data.

    Args:
        vae: must be None: the pipeline has one.

    The others are as in `load_trained_pipeline` and `open_tokenizer`.
    """
    if vae is not None:
        raise ValueError(f"vae must be None with pipeline, which has its own tokenizer, got {vae!r}")
    pipeline = load_trained_pipeline(path, pipeline_class)
    if isinstance(data, CachedLatents):
        data.check_tokenizer(pipeline.vae)
    else:
        complete_tokenizer(pipeline.vae, image_encoder, data.args.resolution)
    return pipeline


def objective_of(pipeline: LatentPipeline, label_dropout: float) -> GeneratorObjective:
    """What trains the generator of a pipeline, with the settings that the pipeline was saved with."""
    if isinstance(pipeline, FAEStarFlowPipeline):
        return STARFlowObjective(pipeline.transformer, pipeline.vae, label_dropout=label_dropout)
    if isinstance(pipeline, FAEMARPipeline):
        is_masked = isinstance(pipeline.transformer, MARTransformer2DModel)
        objective = MARObjective if is_masked else AutoregressiveObjective
        return objective(pipeline.transformer, pipeline.vae, pipeline.scheduler, label_dropout=label_dropout)
    if isinstance(pipeline.scheduler, DDPMScheduler):
        return DiffusionObjective(pipeline.transformer, pipeline.vae, pipeline.scheduler, label_dropout)
    # The scheduler's shift is 1 / s of the objective's.
    shift = 1 / pipeline.scheduler.config.shift
    return FlowMatchingObjective(pipeline.transformer, pipeline.vae, shift, label_dropout)


def save_without_encoder(pipeline: LatentPipeline, folder: str) -> None:
    """Save a pipeline without its tokenizer's frozen encoder, which drawing does not need."""
    if hasattr(pipeline.vae, "image_encoder"):
        pipeline.vae.image_encoder = None
    pipeline.save_pretrained(folder)


class ClassData:
    """Pictures or latents with the class ids of a pipeline.

    Args:
        data: `ImageData` or `CachedLatents`.
        class_ids: the class id of each label of `data`; a single one for data without labels.
    """

    def __init__(self, data, class_ids: list[int]):
        self.data = data
        self.class_ids = torch.tensor(class_ids)

    def __len__(self) -> int:
        return len(self.data)

    def signature(self, *place: int) -> dict:
        """As `ImageData.signature`."""
        return self.data.signature(*place)

    def batches(self, batch_size: int, **place) -> Iterator[dict]:
        """As `ImageData.batches`."""
        return map(self._relabel, self.data.batches(batch_size, **place))

    def validation_batches(self, batch_size: int) -> Iterator[dict]:
        """As `ImageData.validation_batches`."""
        return map(self._relabel, self.data.validation_batches(batch_size))

    def facts(self) -> dict:
        """As `ImageData.facts`."""
        return self.data.facts()

    def _relabel(self, batch):
        labels = batch.get("class_labels", torch.zeros(len(batch["row_ids"]), dtype=torch.long))
        return {**batch, "class_labels": self.class_ids[labels]}


def match_classes(
    pipeline: LatentPipeline, data, class_name: str | None = None, init_class: str | None = None
) -> tuple[ClassData, list[str], list[str]]:
    """Give the pipeline those classes of the data that it does not know by name.

    A pipeline without names has its classes matched by number, if the data have as many, and gets their names. Names
    that are numbers say nothing about a pipeline with names (class 3 of one data set is not that of another): they are
    new classes, unless the pipeline has the very classes of the data.

    Args:
        data: `ImageData` or `CachedLatents`.
        class_name: the class of all rows, for data without labels.
        init_class: class whose embedding new classes start from; by default the mean of all.

    Returns:
        The data with the pipeline's class ids, the names of all their classes, and those that are new.

    Raises:
        ValueError: the classes come neither from labels nor from `class_name`, or from both; unknown `init_class`; the
            pipeline has no names and another number of classes; or it has a class whose name is the same number.
    """
    if (data.id2label is None) == (class_name is None):
        raise ValueError(
            "the classes must come either from label_column or from class_name, "
            f"got {'labels' if data.id2label else 'no labels'} and class_name {class_name!r}"
        )
    names = list(data.id2label.values()) if data.id2label else [class_name]
    if data.id2label and not pipeline.id2label:
        num_classes = pipeline.transformer.config.num_classes
        if len(names) != num_classes:
            raise ValueError(
                f"label_column has {len(names)} classes, and the pipeline {num_classes} without names: there is no "
                "way to match them; give the pipeline names with register_labels({0: ..., 1: ...})"
            )
        pipeline.register_labels(data.id2label)
    if data.id2label == pipeline.id2label:
        return ClassData(data, list(data.id2label)), names, []
    numbers = [name for name in names if name.isdigit() and name in pipeline.label2id]
    if numbers:
        raise ValueError(
            f"the data have the classes {numbers[:5]}, and the pipeline classes of these names, but numbers may mean "
            "something else there, as its other classes are not those of the data: give the classes names"
        )
    new_classes = [name for name in names if name not in pipeline.label2id]
    if new_classes:
        table = pipeline.transformer.class_embedding.weight.detach()
        start = table[pipeline.label_ids(init_class, "init_class")[0]] if init_class else table[:-1].mean(0)
        pipeline.add_classes(dict.fromkeys(new_classes, start))
    return ClassData(data, pipeline.label_ids(names, "label_column")), names, new_classes


def describe_classes(names: list[str], new_classes: list[str]) -> str:
    """What `match_classes` has found, in words."""
    return f"new classes: {', '.join(new_classes) or 'none'}; {len(names) - len(new_classes)} known ones"


class GeneratorValidation:
    """Samples of the trained classes and, where there are batches for it, the loss; the same noise every time.

    Args:
        pipeline, objective: what draws, and what gives the loss and whatever other numbers.
        batches: of the validation split; empty where there is none.
        names: classes to draw from.
        grid_images: pictures in all, spread over the classes.
        seed: of all noise.
        draw: further arguments of the pipeline's call.
    """

    def __init__(
        self,
        pipeline: LatentPipeline,
        objective: GeneratorObjective,
        batches: list[dict],
        names: list[str],
        grid_images: int,
        seed: int,
        **draw,
    ):
        self.pipeline, self.objective, self.batches, self.seed = pipeline, objective, batches, seed
        self.drawn = [names[i * len(names) // grid_images] for i in range(grid_images)]
        self.draw = draw

    def __call__(self, step: int) -> dict:
        generator = torch.Generator().manual_seed(self.seed)
        pictures = self.pipeline(class_labels=self.drawn, generator=generator, **self.draw).images
        device, sums, count = self.pipeline.device, {}, 0
        for batch in self.batches:
            batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
            size = len(batch["class_labels"])
            for name, value in self.objective(batch, ImageRandom(self.seed, count, device)).items():
                if value.ndim == 0:  # the others are tables of the training's log
                    sums[name] = sums.get(name, 0.0) + value.item() * size
            count += size
        means = {name: total / count for name, total in sums.items()}
        return {"samples": make_grid(pictures, labels=self.drawn), **means}
