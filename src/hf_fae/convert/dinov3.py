"""DINOv3 (arXiv 2508.10104) from Meta's own files, such as `dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth`."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from ..encoders import VisionEncoder
from .files import read_weights
from .keys import KeyTable
from .layouts import check_family, count_layers
from .transforms import SPLIT_QKV, Transform


__all__ = ["dinov3_config", "dinov3_table", "load_dinov3"]

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

# Keys have no bias: a mask zeroes the one in the file.
QUERY_AND_VALUE = Transform(
    lambda bias: bias.unflatten(0, (3, -1))[[0, 2]].unbind(),
    lambda query, value: torch.cat([query, torch.zeros_like(query), value]),
)
MASK_TOKEN = Transform(lambda token: token[None], lambda token: token[0])


def dinov3_table() -> KeyTable:
    """The keys of a ViT, and those of `DINOv3ViTModel` as the Hub has them."""
    block, ours = "blocks.{i}", "layer.{i}"
    return KeyTable(
        [
            ("cls_token", "embeddings.cls_token"),
            ("storage_tokens", "embeddings.register_tokens"),
            ("mask_token", "embeddings.mask_token", MASK_TOKEN),
            ("patch_embed.proj.{weight,bias}", "embeddings.patch_embeddings.{weight,bias}"),
            (f"{block}.norm{{1,2}}.{{weight,bias}}", f"{ours}.norm{{1,2}}.{{weight,bias}}"),
            (
                f"{block}.attn.qkv.weight",
                tuple(f"{ours}.attention.{name}_proj.weight" for name in "qkv"),
                SPLIT_QKV,
            ),
            (
                f"{block}.attn.qkv.bias",
                tuple(f"{ours}.attention.{name}_proj.bias" for name in "qv"),
                QUERY_AND_VALUE,
            ),
            (f"{block}.attn.proj.{{weight,bias}}", f"{ours}.attention.o_proj.{{weight,bias}}"),
            (f"{block}.ls{{1,2}}.gamma", f"{ours}.layer_scale{{1,2}}.lambda1"),
            (f"{block}.mlp.fc1.{{weight,bias}}", f"{ours}.mlp.up_proj.{{weight,bias}}"),
            (f"{block}.mlp.fc2.{{weight,bias}}", f"{ours}.mlp.down_proj.{{weight,bias}}"),
            ("norm.{weight,bias}", "norm.{weight,bias}"),
        ],
        dropped=("rope_embed.periods", "blocks.*.attn.qkv.bias_mask", "local_cls_norm.*"),
    )


def dinov3_config(state: Mapping[str, torch.Tensor]) -> dict:
    """Arguments of `DINOv3ViTConfig` for a published state dict.

    Raises:
        ValueError: the state dict is not that of a ViT of DINOv3 with plain feed-forwards.
    """
    names = ("storage_tokens", "rope_embed.periods", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    check_family(state, "DINOv3", names)
    registers, periods, patches, inner = (state[name] for name in names)
    return {
        "hidden_size": patches.shape[0],
        "num_hidden_layers": count_layers(state, "blocks"),
        # Rotary positions have a period for every fourth channel of a head.
        "num_attention_heads": patches.shape[0] // (4 * len(periods)),
        "intermediate_size": len(inner),
        "patch_size": patches.shape[-1],
        "num_register_tokens": registers.shape[1],
    }


def load_dinov3(weights: str | Path, image_size: int = 256, dtype: torch.dtype | None = None) -> VisionEncoder:
    """The frozen encoder of a published file.

    Args:
        weights: file of a ViT trained on LVD-1689M, whose images have ImageNet's mean and std.
        image_size: side of the images that it reads by default.
        dtype: of the weights; None keeps that of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: weights of another family.
    """
    state = read_weights(weights)
    config = DINOv3ViTConfig(**dinov3_config(state), image_size=image_size)
    ours = dinov3_table().to_ours(state)
    dtype = dtype or state["cls_token"].dtype
    # By its loader, which knows how its names have changed since.
    model, info = DINOv3ViTModel.from_pretrained(
        None, config=config, state_dict=ours, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    if unfilled := sorted(info["missing_keys"]):
        raise ValueError(f"{weights} must have all weights of DINOv3, got none for {unfilled[0]!r}")
    return VisionEncoder(model, image_size=image_size, **IMAGENET)
