"""The condition of a generator in training: classes or captions.

A condition turns a batch into keyword arguments of the model, and chooses the classes or captions of validation
samples.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..pipelines.latent_pipeline import LatentPipeline
from .captions import CaptionEncoder
from .latent_cache import CAPTION_EMBEDS
from .protocol import DataWrapper, GeneratorData, TrainingData


__all__ = ["ClassCondition", "ClassData", "PromptData", "TextCondition", "match_classes", "prepare_condition"]


class ClassCondition(nn.Module):
    """Class labels, which dropout replaces by the null class.

    Args:
        null_class: its id.
        names: of the trained classes.
        new_classes: those among them that the pipeline did not know.
    """

    def __init__(self, null_class: int, names: Sequence[str] = (), new_classes: Sequence[str] = ()):
        super().__init__()
        self.null_class, self.names, self.new_classes = null_class, names, new_classes

    def forward(self, batch: dict, dropped: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The condition of a batch with "class_labels" (B,); the null class where `dropped` (B,) is true."""
        labels = batch["class_labels"]
        return {"class_labels": labels if dropped is None else labels.masked_fill(dropped, self.null_class)}

    def prompts(self, batches: list[dict], count: int) -> tuple[list[str], dict]:
        """Names for `count` samples, spread over the classes, and the pipeline's arguments for them."""
        names = _spread(self.names, count)
        return names, {"class_labels": names}

    def describe(self) -> str:
        """The classes in one line, for the start of a run."""
        known = len(self.names) - len(self.new_classes)
        if not self.new_classes:
            return f"{known:,} classes"
        also = f"; {known:,} that the pipeline already has" if known else ""
        return f"new classes: {', '.join(self.new_classes)}{also}"


class TextCondition(nn.Module):
    """Captions embedded by a frozen text encoder, which dropout replaces by the empty text.

    Args:
        transformer: accepts `encoder_hidden_states` and, unless it sees padding, `encoder_attention_mask`.
        captions: the text encoder; it does not become part of this module if batches hold its embeddings.
        has_embeds: whether they do.
    """

    new_classes = ()

    def __init__(self, transformer: nn.Module, captions: CaptionEncoder, has_embeds: bool = False):
        super().__init__()
        self.accepts_mask = "encoder_attention_mask" in inspect.signature(transformer.forward).parameters
        self.max_length = captions.max_length
        self.captions = None if has_embeds else captions
        self.register_buffer("empty", captions([""]), persistent=False)  # (1, max_length, width)
        self.empty_length = int(self.empty.any(dim=-1).sum())

    def forward(self, batch: dict, dropped: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The condition of a batch with "captions" or, as from `CachedLatents`, "caption_embeds" (B, length, width).

        Where `dropped` (B,) is true it is that of the empty text.
        """
        embeds = batch[CAPTION_EMBEDS] if self.captions is None else self.captions(batch["captions"])
        # Masked padding only costs compute.
        length = max(embeds.shape[1], self.empty_length) if self.accepts_mask else self.max_length
        embeds = _pad(embeds, length)
        if dropped is not None:
            embeds = torch.where(dropped[:, None, None], self.empty[:, :length], embeds)
        condition = {"encoder_hidden_states": embeds}
        if self.accepts_mask:
            condition["encoder_attention_mask"] = embeds.any(dim=-1)
        return condition

    def prompts(self, batches: list[dict], count: int) -> tuple[list[str], dict]:
        """Captions for `count` samples, spread over those of `batches`, and the pipeline's arguments for them, with
        which it needs no text encoder."""
        rows = [(batch, index) for batch in batches for index in range(len(batch["captions"]))]
        rows = _spread(rows, count)
        texts = [batch["captions"][index] for batch, index in rows]
        if self.captions is not None:
            embeds = self.captions(texts)
        else:
            embeds = [_pad(batch[CAPTION_EMBEDS][index : index + 1], self.max_length) for batch, index in rows]
            embeds = torch.cat(embeds).to(self.empty.device)
        return texts, {"prompt_embeds": embeds, "negative_prompt_embeds": self.empty}

    def describe(self) -> str:
        """The captions in one line, for the start of a run."""
        source = "embedded in the cache" if self.captions is None else "embedded in each step"
        return f"captions of up to {self.max_length} tokens, {source}"


def _spread(values, count):
    return [values[i * len(values) // count] for i in range(count)]


def _pad(embeds, length):
    return F.pad(embeds, (0, 0, 0, length - embeds.shape[1]))


class ClassData(DataWrapper):
    """Data with the class ids of a pipeline.

    Args:
        data: any `TrainingData`.
        class_ids: the class id of each label of `data`; a single one for data without labels.
    """

    def __init__(self, data: TrainingData, class_ids: list[int]):
        super().__init__(data)
        self.class_ids = torch.tensor(class_ids)

    def extend(self, batch: dict) -> dict:
        """The batch with the pipeline's "class_labels"."""
        labels = batch.get("class_labels", torch.zeros(len(batch["row_ids"]), dtype=torch.long))
        return {**batch, "class_labels": self.class_ids[labels]}


class PromptData(DataWrapper):
    """Data without captions, with one caption for all rows.

    Args:
        data: any `TrainingData`.
        prompt: the caption.
    """

    def __init__(self, data: TrainingData, prompt: str):
        super().__init__(data)
        self.prompt = prompt

    def extend(self, batch: dict) -> dict:
        """The batch with "captions"."""
        return {**batch, "captions": [self.prompt] * len(batch["row_ids"])}


def prepare_condition(
    pipeline: LatentPipeline,
    data: GeneratorData,
    class_name: str | None = None,
    init_class: str | None = None,
    instance_prompt: str | None = None,
) -> tuple[TrainingData, ClassCondition | TextCondition]:
    """The data as the pipeline is trained on them, and the condition; adds new classes to the pipeline.

    Args:
        class_name, init_class: as in `match_classes`, for a class-conditional pipeline.
        instance_prompt: the caption of all rows, for a text-conditional pipeline and data without captions.

    Raises:
        ValueError: an argument for the other kind of pipeline; as `match_classes`; the captions come neither from the
            data nor from `instance_prompt`, or from both; or another text encoder has embedded them.
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
    data.check_caption_encoder(captions)
    condition = TextCondition(pipeline.transformer, captions, has_embeds=data.text_encoder is not None)
    return data if instance_prompt is None else PromptData(data, instance_prompt), condition


def match_classes(
    pipeline: LatentPipeline, data: GeneratorData, class_name: str | None = None, init_class: str | None = None
) -> tuple[ClassData, list[str], list[str]]:
    """Match the classes of the data with those of the pipeline by name, and add the unknown ones to the pipeline.

    A pipeline without names has its classes matched by number, if the data have as many, and gets their names. Names
    that are numbers do not identify classes (class 3 of one data set is not that of another): they are new classes,
    unless the pipeline has exactly the classes of the data.

    Args:
        class_name: the class of all rows, for data without labels.
        init_class: class from whose embedding new classes start; by default the mean of all.

    Returns:
        The data with the pipeline's class ids, the names of all their classes, and the new ones among them.

    Raises:
        ValueError: the classes come neither from labels nor from `class_name`, or from both; `init_class` is unknown;
            the pipeline has no names and another number of classes; or the name of one of its classes is a number that
            the data use, too.
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
                f"label_column has {len(names)} classes, and the pipeline {num_classes} without names: they cannot be "
                "matched; give the pipeline names with register_labels({0: ..., 1: ...})"
            )
        pipeline.register_labels(data.id2label)
    if data.id2label == pipeline.id2label:
        return ClassData(data, list(data.id2label)), names, []
    numbers = [name for name in names if name.isdigit() and name in pipeline.label2id]
    if numbers:
        raise ValueError(
            f"label_column must hold names, got the numbers {numbers[:5]}: the pipeline has classes so named, but "
            "not the other classes of the data, so that they may mean something else"
        )
    new_classes = [name for name in names if name not in pipeline.label2id]
    if new_classes:
        table = pipeline.transformer.class_embedding.weight.detach()
        start = table[pipeline.label_ids(init_class, "init_class")[0]] if init_class else table[:-1].mean(0)
        pipeline.add_classes(dict.fromkeys(new_classes, start))
    return ClassData(data, pipeline.label_ids(names, "label_column")), names, new_classes
