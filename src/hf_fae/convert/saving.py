"""Saving of models whose weights are mapped from other files: as `save_pretrained`, in the memory of one tensor."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from ..autoencoders.frozen_encoder import SUBFOLDER, FrozenEncoderMixin
from .files import cast


__all__ = ["consume"]

SHARD_SIZE = "10GB"  # diffusers' own
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def consume(model: ModelMixin | DiffusionPipeline, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Save a model or a pipeline, and let go of each weight once it is written: it is of no use afterwards.

    Args:
        folder: what `from_pretrained` loads; made if need be.
        dtype: of the saved floating-point weights, except those that a class keeps in fp32; by default their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = model.components if isinstance(model, DiffusionPipeline) else {"": model}
    models = {name: part for name, part in parts.items() if isinstance(part, ModelMixin)}
    size = sum(tensor.nbytes for part in models.values() for tensor in _state(part).values())
    with tqdm(total=size, desc="Converting", unit="B", unit_scale=True) as progress:
        for name, part in parts.items():
            if name in models:
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
    # Sizes and dtypes alone: on the meta device, nothing of the weights is read for it.
    saved = {name: cast(name, torch.empty_like(tensor, device="meta"), keep, dtype) for name, tensor in state.items()}
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(saved, max_shard_size=SHARD_SIZE, filename_pattern=pattern)

    def weights(names) -> Iterator[torch.Tensor]:
        for name in names:
            tensor = state.pop(name)
            set_module_tensor_to_device(model, name, "meta")
            progress.update(tensor.nbytes)
            yield cast(name, tensor, keep, dtype)

    for filename, names in split.filename_to_tensors.items():
        names = sorted(names, key=lambda name: -saved[name].itemsize)  # each is aligned to its own size
        _write(folder / filename, {name: saved[name] for name in names}, weights(names))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write(path: Path, shapes: dict[str, torch.Tensor], tensors: Iterator[torch.Tensor]) -> None:
    """A safetensors file, tensor by tensor: `save_file` takes all of them at once.

    The format is the length of a header, the header in JSON, and the tensors' bytes in its order.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in shapes.items():
        offsets, offset = [offset, offset + tensor.nbytes], offset + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
