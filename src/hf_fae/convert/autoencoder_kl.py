"""LDM's convolutional autoencoders (arXiv 2112.10752) as diffusers' `AutoencoderKL`: VA-VAE, and the KL-16 of MAR."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..utils.hub_errors import hub_errors
from .files import build, read_weights
from .keys import KeyTable
from .layouts import check_family, count_layers
from .transforms import squeeze


__all__ = [
    "autoencoder_kl_config",
    "autoencoder_kl_table",
    "export_autoencoder_kl",
    "load_autoencoder_kl",
    "open_autoencoder_kl",
]

# All else, such as losses and maps to a foundation model, belongs to training.
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def autoencoder_kl_table(num_levels: int) -> KeyTable:
    """The keys of an autoencoder with `num_levels` resolutions; the decoder counts them from the finest one."""
    rules = [
        ("{encoder,decoder}.conv_{in,out}.{weight,bias}", "{encoder,decoder}.conv_{in,out}.{weight,bias}"),
        ("{encoder,decoder}.norm_out.{weight,bias}", "{encoder,decoder}.conv_norm_out.{weight,bias}"),
        ("{quant_conv,post_quant_conv}.{weight,bias}", "{quant_conv,post_quant_conv}.{weight,bias}"),
    ]
    for side in ("encoder", "decoder"):
        for index in (0, 1):
            rules += _resnet_rules(f"{side}.mid.block_{index + 1}", f"{side}.mid_block.resnets.{index}")
        rules += _attention_rules(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
    for level in range(num_levels):
        for theirs, ours in (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}"),
            (f"decoder.up.{level}", f"decoder.up_blocks.{num_levels - 1 - level}"),
        ):
            rules += _resnet_rules(f"{theirs}.block.{{j}}", f"{ours}.resnets.{{j}}")
            rules += _attention_rules(f"{theirs}.attn.{{j}}", f"{ours}.attentions.{{j}}")
            rules += [
                (f"{theirs}.{one}sample.conv.{{weight,bias}}", f"{ours}.{one}samplers.0.conv.{{weight,bias}}")
                for one in ("down", "up")
            ]
    return KeyTable(rules)


def _resnet_rules(theirs: str, ours: str) -> list[tuple]:
    return [
        (f"{theirs}.{{norm,conv}}{{1,2}}.{{weight,bias}}", f"{ours}.{{norm,conv}}{{1,2}}.{{weight,bias}}"),
        (f"{theirs}.nin_shortcut.{{weight,bias}}", f"{ours}.conv_shortcut.{{weight,bias}}"),
    ]


def _attention_rules(theirs: str, ours: str) -> list[tuple]:
    """Linear maps are 1 x 1 convolutions there."""
    rules = [(f"{theirs}.norm.{{weight,bias}}", f"{ours}.group_norm.{{weight,bias}}")]
    for their_map, our_map in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        rules += [
            (f"{theirs}.{their_map}.weight", f"{ours}.{our_map}.weight", squeeze(-1, -2)),
            (f"{theirs}.{their_map}.bias", f"{ours}.{our_map}.bias"),
        ]
    return rules


def autoencoder_kl_config(state: Mapping[str, torch.Tensor]) -> dict:
    """The config of `AutoencoderKL` for a published state dict.

    Raises:
        ValueError: the state dict is not that of an autoencoder with a convolution on its moments.
    """
    check_family(state, "LDM's autoencoders", ("encoder.conv_in.weight", "post_quant_conv.weight"))
    levels = range(count_layers(state, "encoder.down"))
    with_attention = [f"encoder.down.{i}.attn.0.q.weight" in state for i in levels]
    up_with_attention = [f"decoder.up.{i}.attn.0.q.weight" in state for i in reversed(levels)]
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["encoder.conv_in.weight"].shape[1],
        "down_block_types": ["AttnDownEncoderBlock2D" if one else "DownEncoderBlock2D" for one in with_attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if one else "UpDecoderBlock2D" for one in up_with_attention],
        "block_out_channels": [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in levels],
        "layers_per_block": count_layers(state, "encoder.down.0.block"),
        "latent_channels": state["post_quant_conv.weight"].shape[1],
    }


def load_autoencoder_kl(
    weights: str | Path,
    statistics: str | Path | None = None,
    scaling_factor: float = 1.0,
    sample_size: int = 256,
    dtype: torch.dtype | None = None,
) -> AutoencoderKL:
    """The tokenizer of a published file, such as `vavae-imagenet256-f16d32-dinov2.pt` or `kl16.ckpt`.

    Args:
        weights: file of the weights.
        statistics: file with `mean` and `std` of each channel, such as `latents_stats.pt`.
        scaling_factor: multiplies normalised latents. LightningDiT's `latent_multiplier`: 1; MAR's KL-16: 0.2325.
        sample_size: image side of training.
        dtype: of the weights; None keeps that of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: weights of another family or size, or statistics of another number of channels.
    """
    state = {key: tensor for key, tensor in read_weights(weights, ()).items() if key.startswith(PARTS)}
    config = {**autoencoder_kl_config(state), "scaling_factor": scaling_factor, "sample_size": sample_size}
    if statistics is not None:
        config |= _statistics(statistics, config["latent_channels"])
    return build(AutoencoderKL, config, autoencoder_kl_table(len(config["block_out_channels"])).to_ours(state), dtype)


def _statistics(path: str | Path, channels: int) -> dict[str, list[float]]:
    values = read_weights(path, ())
    for name in ("mean", "std"):
        if name not in values or values[name].numel() != channels:
            got = {key: tuple(value.shape) for key, value in values.items()}
            raise ValueError(f"{path} must hold mean and std of {channels} channels, got {got}")
    return {f"latents_{name}": values[name].flatten().tolist() for name in ("mean", "std")}


def open_autoencoder_kl(path: str | Path) -> AutoencoderKL:
    """An autoencoder in diffusers' own format, by Hub id or folder, such as `stabilityai/sd-vae-ft-ema`."""
    with hub_errors(str(path)):
        return AutoencoderKL.from_pretrained(path, use_safetensors=True)


def export_autoencoder_kl(model: AutoencoderKL) -> dict[str, torch.Tensor]:
    """The state dict of a model in LDM's layout; statistics and scaling factor are not part of it."""
    return autoencoder_kl_table(len(model.config.block_out_channels)).to_published(model.state_dict())
