"""What generators are told to draw, as training sees it: classes, or captions.

A condition turns a batch into keyword arguments of the model, and knows what the pictures of a validation are to show.
"""

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..pipelines.latent_pipeline import LatentPipeline
from .captions import CaptionEncoder
from .latent_cache import CAPTION_EMBEDS, CachedLatents


__all__ = ["ClassCondition", "ClassData", "PromptData", "TextCondition", "match_classes", "open_condition"]


class ClassCondition(nn.Module):
    """Class labels, of which the null class can take the place.

    Args:
        null_class: its id.
        names: of the classes that are trained.
        new_classes: those among them that the pipeline did not have.
    """

    def __init__(self, null_class: int, names: Sequence[str] = (), new_classes: Sequence[str] = ()):
        super().__init__()
        self.null_class, self.names, self.new_classes = null_class, names, new_classes

    def forward(self, batch: dict, dropped: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The condition of a batch with "class_labels" (B,), without that of images where `dropped` (B,) is true."""
        labels = batch["class_labels"]
        return {"class_labels": labels if dropped is None else labels.masked_fill(dropped, self.null_class)}

    def prompts(self, batches: list[dict], count: int) -> tuple[list[str], dict]:
        """What `count` pictures are to show, spread over the classes, in words and as arguments of the pipeline."""
        names = _spread(self.names, count)
        return names, {"class_labels": names}

    def describe(self) -> str:
        """The classes in one line, for the start of a run."""
        known = len(self.names) - len(self.new_classes)
        return f"new classes: {', '.join(self.new_classes) or 'none'}; {known} known ones"


class TextCondition(nn.Module):
    """Captions as a frozen text encoder reads them, of which the empty text can take the place.

    Args:
        transformer: takes `encoder_hidden_states` and, unless it sees padding, `encoder_attention_mask`.
        captions: the text encoder. It stays out of this module where batches have its embeddings already.
        has_embeds: whether they have.
    """

    new_classes = ()

    def __init__(self, transformer: nn.Module, captions: CaptionEncoder, has_embeds: bool = False):
        super().__init__()
        self.takes_mask = "encoder_attention_mask" in inspect.signature(transformer.forward).parameters
        self.max_length = captions.max_length
        self.captions = None if has_embeds else captions
        self.register_buffer("empty", captions([""]), persistent=False)  # (1, max_length, width)
        self.empty_length = int(self.empty.any(dim=-1).sum())

    def forward(self, batch: dict, dropped: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The condition of a batch with "caption_embeds" (B, length, width), as `CachedLatents` gives them, or with
        "captions", without that of images where `dropped` (B,) is true."""
        embeds = batch[CAPTION_EMBEDS] if self.captions is None else self.captions(batch["captions"])
        # Behind a mask padding is nothing but work.
        length = max(embeds.shape[1], self.empty_length) if self.takes_mask else self.max_length
        embeds = _pad(embeds, length)
        if dropped is not None:
            embeds = torch.where(dropped[:, None, None], self.empty[:, :length], embeds)
        condition = {"encoder_hidden_states": embeds}
        if self.takes_mask:
            condition["encoder_attention_mask"] = embeds.any(dim=-1)
        return condition

    def prompts(self, batches: list[dict], count: int) -> tuple[list[str], dict]:
        """What `count` pictures are to show: captions spread over those of `batches`, in words and as arguments of the
        pipeline, which then needs no text encoder."""
        rows = [(batch, place) for batch in batches for place in range(len(batch["captions"]))]
        rows = _spread(rows, count)
        texts = [batch["captions"][place] for batch, place in rows]
        if self.captions is not None:
            embeds = self.captions(texts)
        else:
            embeds = [_pad(batch[CAPTION_EMBEDS][place : place + 1], self.max_length) for batch, place in rows]
            embeds = torch.cat(embeds).to(self.empty.device)
        return texts, {"prompt_embeds": embeds, "negative_prompt_embeds": self.empty}

    def describe(self) -> str:
        """The captions in one line, for the start of a run."""
        reader = "read beforehand" if self.captions is None else "read by the text encoder in each step"
        return f"captions of up to {self.max_length} tokens, {reader}"


def _spread(values, count):
    return [values[i * len(values) // count] for i in range(count)]


def _pad(embeds, length):
    return F.pad(embeds, (0, 0, 0, length - embeds.shape[1]))


class _ConditionedData:
    """Pictures or latents with a condition that is not, or not in this form, in their rows.

    Args:
        data: `ImageData` or `CachedLatents`.
    """

    def __init__(self, data):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def condition(self, batch: dict) -> dict:
        """The batch with its condition."""
        raise NotImplementedError

    def signature(self, *place: int) -> dict:
        """As `ImageData.signature`."""
        return self.data.signature(*place)

    def batches(self, batch_size: int, **place) -> Iterator[dict]:
        """As `ImageData.batches`."""
        return map(self.condition, self.data.batches(batch_size, **place))

    def validation_batches(self, batch_size: int) -> Iterator[dict]:
        """As `ImageData.validation_batches`."""
        return map(self.condition, self.data.validation_batches(batch_size))

    def facts(self) -> dict:
        """As `ImageData.facts`."""
        return self.data.facts()


class ClassData(_ConditionedData):
    """Pictures or latents with the class ids of a pipeline.

    Args:
        data: `ImageData` or `CachedLatents`.
        class_ids: the class id of each label of `data`; a single one for data without labels.
    """

    def __init__(self, data, class_ids: list[int]):
        super().__init__(data)
        self.class_ids = torch.tensor(class_ids)

    def condition(self, batch: dict) -> dict:
        labels = batch.get("class_labels", torch.zeros(len(batch["row_ids"]), dtype=torch.long))
        return {**batch, "class_labels": self.class_ids[labels]}


class PromptData(_ConditionedData):
    """Pictures or latents without captions, all of which one text speaks of.

    Args:
        data: `ImageData` or `CachedLatents`.
        prompt: the text.
    """

    def __init__(self, data, prompt: str):
        super().__init__(data)
        self.prompt = prompt

    def condition(self, batch: dict) -> dict:
        return {**batch, "captions": [self.prompt] * len(batch["row_ids"])}


def open_condition(
    pipeline: LatentPipeline,
    data,
    class_name: str | None = None,
    init_class: str | None = None,
    instance_prompt: str | None = None,
) -> tuple[object, ClassCondition | TextCondition]:
    """The data as the pipeline is to be trained on them, and its condition; classes are added to it where need be.

    Args:
        data: `ImageData` or `CachedLatents`.
        class_name, init_class: as `match_classes`, of a pipeline of classes.
        instance_prompt: the caption of all rows, for data without captions, of a pipeline that reads texts.

    Raises:
        ValueError: an argument of the other kind of pipeline, those of `match_classes`; or the captions come neither
            from the data nor from `instance_prompt`, or from both, or another text encoder has read them.
    """
    if pipeline.transformer.config.get("caption_channels") is None:
        if instance_prompt is not None:
            raise ValueError(f"instance_prompt must be None for a pipeline of classes, got {instance_prompt!r}")
        data, names, new_classes = match_classes(pipeline, data, class_name, init_class)
        return data, ClassCondition(pipeline.transformer.config.num_classes, names, new_classes)
    for name, value in (("class_name", class_name), ("init_class", init_class)):
        if value is not None:
            raise ValueError(f"{name} must be None for a pipeline that reads texts, got {value!r}")
    if data.has_captions == (instance_prompt is not None):
        raise ValueError(
            "the captions must come either from caption_column or from instance_prompt, "
            f"got {'captions' if data.has_captions else 'no captions'} and instance_prompt {instance_prompt!r}"
        )
    max_length = pipeline.transformer.config.max_caption_length
    captions = CaptionEncoder(pipeline.tokenizer, pipeline.text_encoder, max_length)
    has_embeds = isinstance(data, CachedLatents) and data.text_encoder is not None
    if has_embeds:
        data.check_caption_encoder(captions)
    condition = TextCondition(pipeline.transformer, captions, has_embeds)
    return data if instance_prompt is None else PromptData(data, instance_prompt), condition


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
