"""Published weights by name: found, converted once, kept as an ordinary saved model, and loaded from there."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoModel, DiffusionPipeline, ModelMixin
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import WeakFileLock

import hf_fae

from ..cards import ORIGIN, write_card
from ..utils.hub_errors import hub_errors
from ..zoo import ZOO, Published, find
from .saving import consume


__all__ = ["cache_folder", "convert_published", "imagenet_labels", "load_published"]


def load_published(
    name: str, dtype: torch.dtype | None = None, files: str | Path | None = None, **kwargs
) -> DiffusionPipeline | ModelMixin:
    """A pipeline or tokenizer with the weights that its authors published, ready to use.

    The first call downloads and converts; the result is kept in huggingface_hub's cache of derived files
    (`HF_HOME/assets/hf_fae`), from which every later call loads, without a network.

    Args:
        name: a row of the table, `hf_fae.zoo.ZOO`; `hf-fae zoo` shows it.
        dtype: to load in; by default fp32. What is kept has the precision of the publication.
        files: folder with the published files, laid out as their repository or side by side. Needed where these are
            not on the Hub, or have no stated licence.
        kwargs: as `from_pretrained`.

    Raises:
        ValueError: an unknown name, files that are not what the name stands for, or `files` is needed and None.
        OSError: a file that cannot be found or fetched.
    """
    folder = cache_folder(name, files)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            convert_published(name, folder, files)
    loader = DiffusionPipeline if (folder / "model_index.json").is_file() else AutoModel
    return loader.from_pretrained(str(folder), dtype=dtype, **kwargs)


def convert_published(
    name: str, output: str | Path, files: str | Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write published weights as a folder for `from_pretrained`, with a model card: all of it or nothing.

    Args:
        name, files: as [`load_published`].
        output: folder that does not exist, or is empty.
        dtype: of the saved weights; by default that of the publication.

    Raises:
        ValueError: as [`load_published`], or `output` has something in it.
        OSError: as [`load_published`].
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output must be a folder that is new or empty, got {str(output)!r}")
    origins = []
    model = _assemble(name, files, origins)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        consume(model, partial, dtype)
        (partial / ORIGIN).write_text(json.dumps(origins, indent=2) + "\n")
        write_card(partial, repo_id=output.as_posix())
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def imagenet_labels() -> dict[int, str]:
    """Names of ImageNet-1k's classes by number, WordNet's with all synonyms, as timm keeps them."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return {index: info.index_to_description(index) for index in range(info.num_classes())}


def _assemble(name: str, files: str | Path | None, origins: list[dict]) -> DiffusionPipeline | ModelMixin:
    """The converted model, whose weights lie in the published files; adds to `origins` what they are."""
    entry, components = find(name), {}
    if files is not None and not Path(files).is_dir():
        raise ValueError(f"files must be a folder, got {str(files)!r}")
    paths = {argument: _locate(name, entry, path, files) for argument, path in entry.files.items()}
    origins.append({"name": name, **_describe(entry, paths)})
    if entry.tokenizer is not None:
        components["vae"] = _assemble(entry.tokenizer, files, origins)
    components |= {argument: _locate_model(model, files) for argument, model in entry.models.items()}
    module, _, function = entry.loader.partition(":")
    load = getattr(importlib.import_module(f"hf_fae.convert.{module}"), function)
    with _naming(name, paths.values()):
        model = load(**paths, **components, **entry.settings)
    if hasattr(model, "register_labels") and model.transformer.config.num_classes == 1000:
        model.register_labels(imagenet_labels())
    return model


@contextlib.contextmanager
def _naming(name: str, paths) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        message, paths = str(error), [str(path) for path in paths]
        where = "" if any(path in message for path in paths) else f" of {', '.join(paths)}"
        raise ValueError(f"{name} cannot be converted{where}: {message}") from error


def _locate(name: str, entry: Published, path: str, files: str | Path | None) -> Path:
    """A published file: in a user's folder, or from the Hub."""
    if files is None:
        if (reason := entry.needs_files) is not None:
            raise ValueError(f"files must be a folder with {path!r} of {entry.address} for {name!r}, which {reason}")
        with hub_errors(entry.source):
            return Path(hf_hub_download(entry.source, path))
    repository = [] if "://" in entry.source else [entry.source, entry.source.rpartition("/")[2]]
    names = [*(f"{folder}/{path}" for folder in repository), path, Path(path).name]
    # Two files of the same name cannot lie side by side.
    if [Path(other).name for other in entry.files.values()].count(names[-1]) > 1:
        names.pop()
    for candidate in names:
        if (found := Path(files, candidate)).is_file():
            return found
    raise FileNotFoundError(f"files must be a folder with {path!r} of {entry.address}, got {str(files)!r}")


def _locate_model(model_id: str, files: str | Path | None) -> str:
    """A model in the libraries' own format: a folder among the user's files, or its Hub id."""
    folders = [] if files is None else [Path(files, model_id), Path(files, model_id.rpartition("/")[2])]
    return next((str(folder) for folder in folders if folder.is_dir()), model_id)


def _describe(entry: Published, paths: dict[str, Path]) -> dict:
    """What a model card says of the files."""
    revisions = {path.parts[path.parts.index("snapshots") + 1] for path in paths.values() if "snapshots" in path.parts}
    facts = {key: getattr(entry, key) for key in ("address", "license", "figure", "paper")}
    return {**facts, "files": list(entry.files.values()), "revision": revisions.pop() if revisions else None}


def cache_folder(name: str, files: str | Path | None = None) -> Path:
    """Where the conversion of a name is kept: apart for other settings, releases, and files of a user.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: `files` lacks one.
    """
    entry = find(name)
    entries = {name: entry} | ({entry.tokenizer: ZOO[entry.tokenizer]} if entry.tokenizer else {})
    identity = [hf_fae.__version__, {key: dataclasses.asdict(value) for key, value in entries.items()}]
    if files is not None:
        for key, value in entries.items():
            paths = [_locate(key, value, path, files).resolve() for path in value.files.values()]
            identity += [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return Path(constants.HF_ASSETS_CACHE, "hf_fae", f"{name}-{digest}")
