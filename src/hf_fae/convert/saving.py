"""Saving of models whose weights are mapped from other files: as `save_pretrained`, in the memory of one shard."""

import json
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm

from ..autoencoders.frozen_encoder import SUBFOLDER, FrozenEncoderMixin
from .files import cast


__all__ = ["consume"]

SHARD_SIZE = "1GB"


def consume(model: ModelMixin | DiffusionPipeline, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save a model or a pipeline, and let go of its weights as they are written: it is of no use afterwards.

    Args:
        folder: what `from_pretrained` loads; made if need be.
        dtype: of the saved floating-point weights, except those that a class keeps in fp32; by default their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = model.components if isinstance(model, DiffusionPipeline) else {"": model}
    size = sum(
        tensor.nbytes for part in parts.values() if isinstance(part, ModelMixin) for tensor in _state(part).values()
    )
    with tqdm(total=size, desc=f"Writing {folder.name}", unit="B", unit_scale=True) as progress:
        for name, part in parts.items():
            if isinstance(part, ModelMixin):
                _consume_weights(part, folder / name, dtype, progress)
            elif part is not None:
                part.save_pretrained(folder / name)
    model.save_config(folder)


def _state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("image_encoder.")}


def _consume_weights(model, folder, dtype, progress):
    if isinstance(model, FrozenEncoderMixin) and model.image_encoder is not None:
        model.image_encoder.save_pretrained(folder / SUBFOLDER)
    model.save_config(folder)
    state, keep = _state(model), getattr(model, "_keep_in_fp32_modules", None)
    # Sizes and names alone: on the meta device, nothing of the weights is read for it.
    saved = {name: cast(name, torch.empty_like(tensor, device="meta"), keep, dtype) for name, tensor in state.items()}
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(saved, max_shard_size=SHARD_SIZE, filename_pattern=pattern)
    for filename, names in split.filename_to_tensors.items():
        shard = {name: cast(name, state.pop(name), keep, dtype).contiguous() for name in names}
        save_file(shard, folder / filename, metadata={"format": "pt"})
        for name in names:
            progress.update(saved[name].nbytes)
            set_module_tensor_to_device(model, name, "meta")
        del shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
