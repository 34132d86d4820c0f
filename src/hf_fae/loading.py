"""Models as users name them, by folder or Hub id, with one-sentence errors that name the argument."""

import contextlib
import json
import os
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline

from .autoencoders.frozen_encoder import FrozenEncoderMixin
from .latents import LatentAutoencoderMixin
from .pipelines.latent_pipeline import LatentPipeline
from .utils.config_bounds import check_numbers
from .utils.hub_errors import explain_hub_error


__all__ = [
    "complete_text_encoder",
    "hub_commit",
    "load_tokenizer",
    "load_trained_pipeline",
    "loading",
    "open_pipeline",
    "open_tokenizer",
]


@contextlib.contextmanager
def loading(argument: str, value: str):
    """Turn the libraries' errors about checkpoints into one sentence that names the argument and its value.

    Raises:
        ValueError: loading within this context failed.
    """
    try:
        yield
    except Exception as error:  # each library fails in its own way
        place = value.rpartition("=")[2]
        absent = " is not a local folder and" if "/" in place and not os.path.exists(place) else ""
        sentence = re.split(r"(?<=[.!?])\s", " ".join(str(error).split()))[0] or type(error).__name__
        cause = explain_hub_error(error) or sentence
        raise ValueError(f"{argument} {value!r}{absent} cannot be loaded: {cause}") from error


def open_pipeline(
    argument: str, path: str, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> LatentPipeline:
    """A pipeline of ours, of which nothing is built before the numbers in all its configs are known to be in bounds.

    Args:
        argument: whose value `path` is, for messages.
        path: Hub id or folder.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ValueError: it cannot be loaded, or is none of hf_fae; a revision of a folder.
    """
    if revision is not None and os.path.isdir(path):
        raise ValueError(f"revision must be None for the folder {path!r}, got {revision!r}")
    with loading(argument, path):
        folder = Path(path if os.path.isdir(path) else DiffusionPipeline.download(path, revision=revision))
        for file in sorted([*folder.rglob("config.json"), *folder.rglob("scheduler_config.json")]):
            config = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError(f"{str(file)!r} must hold a JSON object, got a {type(config).__name__}")
            check_numbers(config, repr(str(file)))
        pipe = DiffusionPipeline.from_pretrained(path, dtype=dtype, revision=revision)
    if not isinstance(pipe, LatentPipeline):
        raise ValueError(f"{argument} {path!r} must be a pipeline of hf_fae, got a {type(pipe).__name__}")
    return pipe


def hub_commit(path: str, revision: str | None = None) -> str | None:
    """The commit of a pipeline of the Hub that has been loaded; None for a folder."""
    if os.path.isdir(path):
        return None
    return Path(DiffusionPipeline.download(path, revision=revision, local_files_only=True)).name


def load_tokenizer(path: str, **kwargs) -> LatentAutoencoderMixin | AutoencoderKL:
    """A tokenizer of ours, or diffusers' `AutoencoderKL`, in fp32; with its frozen encoder only if it was saved so.

    Args:
        path: Hub id or folder.
        kwargs: as in `from_pretrained`.

    Raises:
        ValueError: another model.
    """
    vae = AutoModel.from_pretrained(path, **kwargs)
    if not isinstance(vae, (LatentAutoencoderMixin, AutoencoderKL)):
        raise ValueError(f"{path!r} must be a tokenizer of hf_fae or an AutoencoderKL, got a {type(vae).__name__}")
    return vae.float()


def open_tokenizer(
    path: str,
    encoder: str | None = None,
    dtype: torch.dtype = torch.float32,
    arguments: tuple[str, str] = ("--model", "--encoder"),
) -> LatentAutoencoderMixin | AutoencoderKL:
    """A tokenizer, or that of a pipeline, ready to encode.

    Args:
        path: Hub id or folder of either.
        encoder: the frozen encoder of a tokenizer saved without it; by default the one that its config names.
        arguments: whose values `path` and `encoder` are, for messages.

    Raises:
        ValueError: it cannot be loaded, is not a tokenizer, or has no encoder and names none.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    model_argument, encoder_argument = arguments
    with loading(model_argument, path):
        if os.path.isdir(path):
            is_pipeline = os.path.isfile(os.path.join(path, "model_index.json"))
        else:
            try:
                is_pipeline = bool(hf_hub_download(path, "model_index.json"))
            except LocalEntryNotFoundError:  # the Hub does not answer: that says nothing about the file
                raise
            except EntryNotFoundError:
                is_pipeline = False
        location = {"subfolder": "vae"} if is_pipeline else {}
        keep_encoder = {"image_encoder": None} if encoder else {}
        vae = AutoModel.from_pretrained(path, dtype=dtype, **location, **keep_encoder)
    if not isinstance(vae, (LatentAutoencoderMixin, AutoencoderKL)):
        raise ValueError(f"{model_argument} {path!r} must be a tokenizer of hf_fae, got a {type(vae).__name__}")
    if isinstance(vae, FrozenEncoderMixin) and vae.image_encoder is None:
        name = encoder or vae.config.image_encoder_id
        if name is None:
            raise ValueError(
                f"{model_argument} {path!r} comes without its frozen encoder and names none: pass {encoder_argument}"
            )
        with loading(encoder_argument, name):
            vae.load_encoder(encoder)
    return vae


def load_trained_pipeline(path: str, pipeline_class: type[LatentPipeline] = LatentPipeline) -> LatentPipeline:
    """A pipeline in fp32.

    Args:
        path: Hub id or folder.
        pipeline_class: the required class.

    Raises:
        ValueError: a pipeline of another class.
    """
    pipeline = open_pipeline("pipeline", path)
    if not isinstance(pipeline, pipeline_class):
        raise ValueError(f"pipeline {path!r} must be a {pipeline_class.__name__}, got a {type(pipeline).__name__}")
    return pipeline


def complete_text_encoder(pipeline: LatentPipeline, text_encoder: str | None = None) -> None:
    """Load the text encoder of a text-conditional pipeline that was saved without one.

    Args:
        text_encoder: Hub id or folder; by default the one that the pipeline's config names.

    Raises:
        ValueError: it cannot be loaded or does not fit, none is named, or one is named that is not needed.
    """
    needs_one = pipeline.reads_text and pipeline.text_encoder is None
    if text_encoder is not None and not needs_one:
        reason = "has its own" if pipeline.reads_text else "reads no text"
        raise ValueError(f"text_encoder must be None with this pipeline, which {reason}, got {text_encoder!r}")
    if not needs_one:
        return
    name = text_encoder or pipeline.config.text_encoder_id
    if name is None:
        raise ValueError("text_encoder must name that of the pipeline, which comes without, got None")
    with loading("text_encoder", name):
        pipeline.load_text_encoder(name)
