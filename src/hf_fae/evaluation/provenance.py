"""Which model, which settings: what a report states so that its numbers can be measured again."""

import hashlib
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from ..utils.digests import hash_file
from .options import EvaluationArguments


__all__ = ["describe_run", "identify_model"]


def describe_run(args: EvaluationArguments, resolution: int, device: torch.device) -> dict:
    """The settings that every evaluation of a model has, JSON-able."""
    return {
        "model": identify_model(args.model),
        "encoder": identify_model(args.encoder) if getattr(args, "encoder", None) else None,
        "dtype": args.dtype,
        "device": device.type,
        "resolution": resolution,
        "batch_size": args.batch_size,
        "seed": args.seed,
    }


def identify_model(path: str) -> dict[str, str]:
    """Which checkpoint this is: {"path", "revision"} of a Hub id that has been loaded, {"path", "sha256"} of a folder.

    The hash covers the names and contents of all configs and weights, without training checkpoints and evaluation
    folders.
    """
    if not Path(path).is_dir():
        files = [try_to_load_from_cache(path, name) for name in ("model_index.json", "config.json")]
        return {"path": path, "revision": next(Path(file).parent.name for file in files if isinstance(file, str))}
    digest = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")):
        name = file.relative_to(path)
        if file.suffix not in (".json", ".safetensors") or name.parts[0].startswith(("checkpoint-", ".")):
            continue
        if not any(Path(path, folder, "settings.json").exists() for folder in name.parents[:-1]):
            digest.update(f"{name.as_posix()} {hash_file(file)}\n".encode())
    return {"path": path, "sha256": digest.hexdigest()}
