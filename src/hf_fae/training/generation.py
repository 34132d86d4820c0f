"""What the trainings of generators share: a pipeline to start from, the classes of the data in it, validation."""

from collections.abc import Iterator

import torch

from ..images import make_grid
from ..pipelines.fae_dit import FAEDiTPipeline
from .objectives import FlowMatchingObjective
from .randomness import ImageRandom


__all__ = ["ClassData", "GeneratorValidation", "describe_classes", "load_trained_pipeline", "match_classes"]


def load_trained_pipeline(path: str) -> FAEDiTPipeline:
    """A pipeline in fp32, silent.

    Args:
        path: Hub id or folder.
    """
    pipeline = FAEDiTPipeline.from_pretrained(path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
    pipeline: FAEDiTPipeline, data, class_name: str | None = None, init_class: str | None = None
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
        pipeline, objective: what draws, and what gives the loss.
        batches: of the validation split; empty where there is none.
        names: classes to draw from.
        grid_images: pictures in all, spread over the classes.
        num_inference_steps: for each.
        seed: of all noise.
    """

    def __init__(
        self,
        pipeline: FAEDiTPipeline,
        objective: FlowMatchingObjective,
        batches: list[dict],
        names: list[str],
        grid_images: int,
        num_inference_steps: int,
        seed: int,
    ):
        self.pipeline, self.objective, self.batches, self.seed = pipeline, objective, batches, seed
        self.drawn = [names[i * len(names) // grid_images] for i in range(grid_images)]
        self.num_inference_steps = num_inference_steps

    def __call__(self, step: int) -> dict:
        generator = torch.Generator().manual_seed(self.seed)
        pictures = self.pipeline(self.drawn, num_inference_steps=self.num_inference_steps, generator=generator).images
        results = {"samples": make_grid(pictures, labels=self.drawn)}
        device, loss, count = self.pipeline.device, 0.0, 0
        for batch in self.batches:
            batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
            size = len(batch["class_labels"])
            loss += self.objective(batch, ImageRandom(self.seed, count, device))["loss"].item() * size
            count += size
        return {**results, "loss": loss / count} if count else results
