"""The published tokenizers of l-DeTok (jjiaweiyang/l-DeTok) and `AutoencoderDeTok`, in both directions.

A `.pth` file nests averaged weights under `model_ema`; `stats.pkl` has latent statistics by name: those of
`detok-BB-gamm3.0-m0.7` belong to the file of that name and to the one with the tuned decoder.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..autoencoders.detok import AutoencoderDeTok
from ..presets import DETOK_SIZES
from .files import build, read_pickled_tensors, read_weights
from .keys import KeyTable
from .layouts import attention_rules, check_family, count_layers, square_side
from .transforms import SWAP_HALVES, chain, pixel_rows, squeeze


__all__ = ["detok_config", "detok_table", "export_detok", "load_detok"]

HEADS = {width: heads for width, _, heads in DETOK_SIZES.values()}


def detok_table(patch_size: int = 16) -> KeyTable:
    """The keys of a tokenizer; its pixels are rows (p, q, colour) there and (colour, p, q) in ours."""
    half, pixels = "{encoder,decoder}", pixel_rows(patch_size, 3)
    published, ours = f"{half}.transformer.{{i}}", f"{half}.blocks.{{i}}"
    return KeyTable(
        [
            ("encoder.patch_embed.0.{weight,bias}", "encoder.proj_in.{weight,bias}"),
            ("encoder.latent_head.{weight,bias}", "encoder.proj_out.{weight,bias}"),
            ("decoder.decoder_embed.{weight,bias}", "decoder.proj_in.{weight,bias}"),
            ("decoder.mask_token", "decoder.mask_token", squeeze(0, 1)),
            ("decoder.ffn.1.weight", "decoder.proj_out.weight", chain(squeeze(-1, -2), pixels)),
            ("decoder.ffn.1.bias", "decoder.proj_out.bias", pixels),
            ("decoder.conv_out.{weight,bias}", "decoder.conv_out.{weight,bias}"),
            (f"{half}.positional_embedding", f"{half}.positions", squeeze(0)),
            (f"{half}.ln_pre.weight", f"{half}.norm_in.weight"),
            (f"{half}.ln_post.weight", f"{half}.norm_out.weight"),
            (f"{published}.norm{{1,2}}.weight", f"{ours}.norm{{1,2}}.weight"),
            *attention_rules(published, ours),
            (f"{published}.mlp.w12.{{weight,bias}}", f"{ours}.ff.net.0.proj.{{weight,bias}}", SWAP_HALVES),
            (f"{published}.mlp.w3.{{weight,bias}}", f"{ours}.ff.net.2.{{weight,bias}}"),
        ]
    )


def detok_config(state: Mapping[str, torch.Tensor], **config) -> dict:
    """The config of `AutoencoderDeTok` for a published state dict.

    Args:
        config: values that replace those of the state dict, which does not show the numbers of heads of other sizes
            than the published ones, nor `noise_gamma`.

    Raises:
        ValueError: the state dict is not that of such a tokenizer, or has unknown numbers of heads.
    """
    positions = [f"{half}.positional_embedding" for half in ("encoder", "decoder")]
    check_family(
        state, "an l-DeTok tokenizer", [*positions, "encoder.patch_embed.0.weight", "decoder.decoder_embed.weight"]
    )
    patch_size = state["encoder.patch_embed.0.weight"].shape[-1]
    found = {
        "sample_size": patch_size * square_side(state[positions[0]].shape[1]),
        "patch_size": patch_size,
        "latent_channels": state["decoder.decoder_embed.weight"].shape[1],
        "rotary_as_released": True,
    }
    for half, name in zip(("encoder", "decoder"), positions, strict=True):
        width = state[name].shape[-1]
        found[f"{half}_hidden_size"] = width
        found[f"{half}_num_layers"] = count_layers(state, f"{half}.transformer")
        found[f"{half}_num_attention_heads"] = config.get(f"{half}_num_attention_heads", HEADS.get(width))
        if found[f"{half}_num_attention_heads"] is None:
            raise ValueError(
                f"{half}_num_attention_heads must be given for a width that is not published, got {width}"
            )
    return found | config


def load_detok(
    weights: str | Path,
    statistics: str | Path | None = None,
    statistics_key: str | None = None,
    dtype: torch.dtype | None = None,
    **config,
) -> AutoencoderDeTok:
    """A published tokenizer, with the statistics of its latents.

    Args:
        weights: file such as `detok-BB-gamm3.0-m0.7.pth`.
        statistics: file `stats.pkl`; without it latents are not normalised.
        statistics_key: entry of `statistics`, such as `"detok-BB-gamm3.0-m0.7"`; by default its only one.
        dtype: of the weights; None keeps that of the file.
        config: as in `detok_config`: `noise_gamma=0.0` for `vitok-BB.pth`, which was trained without noise.

    Raises:
        ValueError: files of another kind, or a `statistics_key` that is not in the file.
    """
    state = read_weights(weights, ema=("model_ema",))
    config = detok_config(state, **config)
    ours = detok_table(config["patch_size"]).to_ours(state)
    shape = (config["latent_channels"], 1, 1)
    ours |= {"latents_mean": torch.zeros(shape), "latents_std": torch.ones(shape)}
    vae = build(AutoencoderDeTok, config, ours, dtype)
    if statistics is not None:
        vae.set_latent_statistics(*_channel_statistics(statistics, statistics_key, shape))
    return vae


def export_detok(vae: AutoencoderDeTok) -> dict[str, torch.Tensor]:
    """The state dict of the reference code for our tokenizer, without the statistics of its latents.

    Raises:
        ValueError: a tokenizer with proper rotations, which the reference code does not compute.
    """
    if not vae.config.rotary_as_released:
        raise ValueError("vae must have rotary_as_released True, as the reference code computes, got False")
    state = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith("latents_")}
    return detok_table(vae.config.patch_size).to_published(state)


def _channel_statistics(path, key, shape):
    tables = read_pickled_tensors(path)
    names = list(tables) if isinstance(tables, dict) else []
    if key is None and len(names) == 1:
        key = names[0]
    if key not in names:
        raise ValueError(f"statistics_key must be one of {names} in {path}, got {key!r}")
    # The log-variance channels of the posterior follow those of the mean.
    return (values[: shape[0]].view(shape) for values in tables[key]["channel"])
