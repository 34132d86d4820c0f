"""Parts, exact parameter counts and shapes of a preset or a saved folder.

No weights are allocated: models are built on the meta device, and only the headers of checkpoints are read.
"""

import json
import re
from collections import Counter
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import nn

import hf_fae

from .autoencoders.frozen_encoder import SUBFOLDER as ENCODER_FOLDER
from .autoencoders.frozen_encoder import FrozenEncoderMixin
from .encoders import VisionEncoder
from .generators.class_table import ClassTableMixin
from .generators.denoiser import LatentDenoiser
from .generators.token_generator import TokenGenerator
from .latents import LatentAutoencoderMixin
from .layers.positions import grid_size, token_grid
from .presets import PRESETS, build_preset


__all__ = ["count_parameters", "inspect", "inspect_model", "model_shapes"]

# diffusers' and transformers' names of weight files, with an optional variant and shard number.
WEIGHT_FILE = re.compile(r"(?:diffusion_pytorch_)?model(?:\.([^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")


def count_parameters(module: nn.Module) -> int:
    """Parameters as the paper counts them: never latent statistics, fixed tables only where it does."""
    counted = (part for part in module.modules() if getattr(part, "counted", False))
    fixed = (buffer for part in counted for buffer in part.buffers(recurse=False))
    return sum(tensor.numel() for tensor in (*module.parameters(), *fixed))


def model_shapes(model: ModelMixin) -> dict[str, list[int]]:
    """Input, latent and output shapes at the training size, without the batch axis; empty for models of others.

    Args:
        model: a tokenizer or a generator on the meta device.
    """
    config, tensors = model.config, {}
    if isinstance(model, FrozenEncoderMixin):
        grid = token_grid(config.sample_size, config.patch_size)
        features = torch.empty(1, *model.feature_shape, device="meta")
        posterior = model.encode_features(features, grid).latent_dist
        tensors = {
            "features": features,
            "moments": posterior.parameters,
            "latents": posterior.mean,
            "decoded_features": model.decode_features(posterior.mean),
            "image": model.decode(posterior.mean).sample,
        }
    elif isinstance(model, LatentAutoencoderMixin):
        images = torch.empty(1, 3, *grid_size(config.sample_size), device="meta")
        posterior = model.encode(images).latent_dist
        tensors = {
            "moments": posterior.parameters,
            "latents": posterior.mean,
            "image": model.decode(posterior.mean).sample,
        }
    elif isinstance(model, TokenGenerator):
        tensors = {
            "hidden_states": torch.empty(1, config.in_channels, *grid_size(config.sample_size), device="meta"),
            "tokens": torch.empty(1, model.num_tokens, model.token_dim, device="meta"),
        }
        order = torch.empty(1, model.num_tokens, dtype=torch.long, device="meta")
        labels = torch.empty(1, dtype=torch.long, device="meta")
        conditions = model.predict_conditions(tensors["tokens"], order, 0, model.num_tokens, labels)
        tensors["conditions"] = conditions
        # Times of tokens have the shape of an order.
        tensors["prediction"] = model.diffusion_head(tensors["tokens"], order, conditions)
    elif isinstance(model, (ClassTableMixin, LatentDenoiser)):  # another generator
        tensors = {"hidden_states": torch.empty(1, config.in_channels, *grid_size(config.sample_size), device="meta")}
        if config.get("caption_channels") is not None:
            shape = (1, config.max_caption_length, config.caption_channels)
            tensors["encoder_hidden_states"] = torch.empty(shape, device="meta")
        other = {}
        if config.get("num_classes") is not None:
            other["class_labels"] = torch.empty(1, dtype=torch.long, device="meta")
        if isinstance(model, LatentDenoiser):
            other["timestep"] = torch.empty(1, device="meta")
        tensors["sample"] = model(**tensors, **other).sample
    return {name: list(tensor.shape[1:]) for name, tensor in tensors.items()}


def inspect_model(name: str, model: ModelMixin) -> dict:
    """`name`, `class`, `parameters` (by part, and `total`), `shapes` and `config` of a model on the meta device.

    A tokenizer's frozen encoder is listed under `frozen` and not part of the total.
    """
    parts = {part: count_parameters(module) for part, module in model.named_children() if part != "image_encoder"}
    report = {
        "name": name,
        "class": type(model).__name__,
        "parameters": {**{part: count for part, count in parts.items() if count}, "total": sum(parts.values())},
        "shapes": model_shapes(model),
        "config": {key: value for key, value in model.config.items() if not key.startswith("_")},
    }
    if encoder_config := model.config.get("image_encoder_config"):
        with torch.device("meta"):
            report["frozen"] = {"image_encoder": count_parameters(VisionEncoder.from_config(encoder_config))}
    return report


def inspect(name_or_path: str | Path) -> dict:
    """Describe a preset, or a folder with a saved model or pipeline.

    Returns:
        For a model the report of `inspect_model`; for a folder also `weights`, for each variant the number of tensors
        and the elements of each dtype, and under `components` a tokenizer's frozen encoder if the folder has it.
        For a pipeline `name`, `class`, `parameters` (by component, and `total`), `config` and `components`, a
        description of each.

    Raises:
        ValueError: neither a preset nor such a folder, a config of an unknown class or with unknown keys, or
            safetensors files that are corrupt or do not fit their config.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if (path / "model_index.json").is_file():
        return _inspect_pipeline(path)
    if (path / "config.json").is_file():
        return _inspect_component(path)
    if path.is_dir():
        raise ValueError(f"folder {name!r} has neither a config.json nor a model_index.json")
    if name not in PRESETS and len(path.parts) > 1:
        raise ValueError(f"{name!r} is not a folder")
    return inspect_model(name, build_preset(name, device="meta"))


def _inspect_pipeline(path: Path) -> dict:
    index = _read_json(path / "model_index.json")
    # A component is recorded as [library, class], and as [null, null] where it was left out.
    names = [key for key, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1]]
    components = {}
    for name in names:
        folder = path / name
        if (folder / "config.json").is_file():
            components[name] = _inspect_component(folder)
        elif folder.is_dir():  # a scheduler or an image processor, without weights
            components[name] = {"name": name, "class": index[name][1], "parameters": {"total": 0}}
        else:
            raise ValueError(f"folder {str(path)!r} lacks its component {name!r}")
    counts = {name: part["parameters"]["total"] for name, part in components.items() if part["parameters"]["total"]}
    return {
        "name": str(path),
        "class": index.get("_class_name"),
        "parameters": {**counts, "total": sum(counts.values())},
        "config": {key: value for key, value in index.items() if key[0] != "_" and not isinstance(value, list)},
        "components": components,
    }


def _inspect_component(path: Path) -> dict:
    config = _read_json(path / "config.json")
    tensors = _read_headers(path)
    weights = {variant: _summary(tensors[variant]) for variant in sorted(tensors)}
    class_name = config.get("_class_name")
    if class_name is None:
        if "model_type" not in config:
            raise ValueError(f"{str(path / 'config.json')!r} names no model class")
        # A transformers model: counted by its weights.
        counts = [sum(torch.Size(shape).numel() for _, shape in found.values()) for found in tensors.values()]
        total = {"total": max(counts, default=0)}
        model_class = (config.get("architectures") or [config["model_type"]])[0]
        return {"name": path.name, "class": model_class, "parameters": total, "config": config, "weights": weights}

    model_class = getattr(hf_fae, class_name, None) or getattr(diffusers, class_name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, ModelMixin)):
        raise ValueError(f"{str(path / 'config.json')!r} names the class {class_name!r}, which is not a known model")
    with torch.device("meta"):
        model = model_class.from_config(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for variant, found in tensors.items():
        _check_fit(path, variant, expected, {name: shape for name, (_, shape) in found.items()})
    report = {**inspect_model(str(path), model), "weights": weights}
    if (path / ENCODER_FOLDER / "config.json").is_file():
        report["components"] = {"image_encoder": _inspect_component(path / ENCODER_FOLDER)}
    return report


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got a {type(content).__name__}")
    return content


def _read_headers(folder: Path) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Variant ("" without one) -> tensor name -> dtype and shape, over all shards."""
    variants = {}
    for path in sorted(folder.glob("*.safetensors")):
        if match := WEIGHT_FILE.fullmatch(path.name):
            tensors = variants.setdefault(match[1] or "", {})
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        header = file.get_slice(name)
                        tensors[name] = (header.get_dtype(), header.get_shape())
            except SafetensorError as error:
                raise ValueError(f"{str(path)!r} is not a complete safetensors file: {error}") from error
    return variants


def _summary(tensors: dict[str, tuple[str, list[int]]]) -> dict:
    dtypes = Counter()
    for dtype, shape in tensors.values():
        dtypes[dtype] += torch.Size(shape).numel()
    return {"tensors": len(tensors), "elements": dict(dtypes)}


def _check_fit(path: Path, variant: str, expected: dict[str, list[int]], found: dict[str, list[int]]) -> None:
    problems = {
        "lack": sorted(expected.keys() - found.keys()),
        "have the unknown": sorted(found.keys() - expected.keys()),
        "have another shape of": sorted(name for name in expected.keys() & found if expected[name] != found[name]),
    }
    for problem, names in problems.items():
        if names:
            which = f"weights (variant {variant!r})" if variant else "weights"
            raise ValueError(f"the {which} in {str(path)!r} {problem} {names[0]!r} ({len(names)} such tensors)")
