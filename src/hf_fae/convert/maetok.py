"""The published tokenizers of MAETok (MAETok/maetok-b-128, MAETok/maetok-b-128-512) and `AutoencoderMAETok`.

A repository has a `config.json` with the flat settings of its training and a `model.safetensors`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..autoencoders.maetok import AutoencoderMAETok
from .files import build, read_weights
from .keys import KeyTable
from .layouts import check_family, count_layers, vit_block_rules
from .transforms import Transform, fold_first_position, pixel_rows, squeeze


__all__ = ["load_maetok", "maetok_config", "maetok_table"]

HEAD_DIM = 64  # of all DINOv2's ViTs
# Settings of which only one value can be expressed.
REQUIRED = {
    "enc_type": "vit",
    "dec_type": "vit",
    "enc_tuning_method": "full",
    "dec_tuning_method": "full",
    "to_pixel": "linear",
    "use_rope": True,
    "rope_mixed": True,
}
# Others have registers (DINOv2-reg), other norms or positions (CLIP, SAM, EVA).
MODELS = {
    "encoder_model": r"vit_(small|base|large)_patch14_dinov2\.lvd142m",
    "decoder_model": r"vit_(small|base|large)_patch14_dinov2(\.lvd142m|_movqv2)",
}
# All else serves training: auxiliary decoders, teachers, projections, quantizers, discriminators.
PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
DROPPED = (
    "{encoder,decoder}.freqs_t_{x,y}",  # column and row of each patch
    "decoder.model.norm.adaLN_modulation.1.{weight,bias}",  # acts on latent tokens, whose output is not used
    "decoder.model.pos_embed",  # not used with rotary positions, unlike the encoder's
    "decoder.model.patch_embed.proj.{weight,bias}",
)


def maetok_table(patch_size: int, encoder_heads: int, decoder_heads: int) -> KeyTable:
    """The keys of a tokenizer; its pixels are rows (p, q, colour) there and (colour, p, q) in ours."""
    half, pixels = "{encoder,decoder}", pixel_rows(patch_size, 3)
    published, ours = f"{half}.model.blocks.{{i}}", f"{half}.blocks.{{i}}"
    return KeyTable(
        [
            ("encoder.model.patch_embed.proj.{weight,bias}", "encoder.proj_in.{weight,bias}"),
            (
                ("encoder.model.cls_token", "encoder.model.pos_embed"),
                ("encoder.class_token", "encoder.positions"),
                fold_first_position(1),
            ),
            ("encoder.latent_tokens", "encoder.latent_tokens", squeeze(0)),
            ("quant_conv.{weight,bias}", "encoder.proj_out.{weight,bias}"),
            ("post_quant_conv.{weight,bias}", "decoder.proj_in.{weight,bias}"),
            ("decoder.model.cls_token", "decoder.class_token", squeeze(0, 1)),
            ("decoder.to_pixel.model.{weight,bias}", "decoder.proj_out.{weight,bias}", pixels),
            (f"{half}.mask_token", f"{half}.mask_token", squeeze(0, 1)),
            (f"{half}.latent_pos_embed", f"{half}.latent_positions", squeeze(0)),
            ("encoder.freqs", "encoder.rotary.frequencies", _split_heads(encoder_heads)),
            ("decoder.freqs", "decoder.rotary.frequencies", _split_heads(decoder_heads)),
            (f"{published}.norm{{1,2}}.{{weight,bias}}", f"{ours}.norm{{1,2}}.{{weight,bias}}"),
            *vit_block_rules(published, ours),
            (f"{published}.ls{{1,2}}.gamma", f"{ours}.scale{{1,2}}.weight"),
            (f"{published}.adaLN_modulation.1.{{weight,bias}}", f"{ours}.modulation.{{weight,bias}}"),
            (f"{half}.model.norm.{{weight,bias}}", f"{half}.norm_out.{{weight,bias}}"),
        ],
        dropped=DROPPED,
    )


def _split_heads(heads: int) -> Transform:
    """Learned frequencies: [columns, rows] (2, layers, heads * pairs) there, [rows, columns] for each head in ours."""
    return Transform(lambda tensor: tensor.unflatten(2, (heads, -1)).flip(0), lambda tensor: tensor.flip(0).flatten(2))


def maetok_config(settings: Mapping, state: Mapping[str, torch.Tensor], **config) -> dict:
    """The config of `AutoencoderMAETok` for the published settings and state dict.

    Args:
        settings: of `config.json`.
        config: values that replace those found, such as numbers of heads for another head width than 64.

    Raises:
        ValueError: settings that this class does not express, or the state dict of another family.
    """
    names = ["image_size", "enc_patch_size", "dec_patch_size", "num_latent_tokens", "codebook_embed_dim"]
    for name in [*names, *REQUIRED, *MODELS, "dec_cls_token", "rope_theta", "vq_mean", "vq_std"]:
        if name not in settings:
            raise ValueError(f"config must have the settings of a MAETok tokenizer, got none for {name!r}")
    for name, value in (REQUIRED | {"dec_patch_size": settings["enc_patch_size"]}).items():
        if settings[name] != value:
            raise ValueError(f"config must have {name} {value!r}, got {settings[name]!r}")
    for name, pattern in MODELS.items():
        if not re.fullmatch(pattern, settings[name]):
            raise ValueError(f"config must have a plain DINOv2 ViT as its {name}, got {settings[name]!r}")
    check_family(state, "a MAETok tokenizer", ["encoder.latent_tokens", "decoder.latent_pos_embed"])
    found = {
        "sample_size": settings["image_size"],
        "patch_size": settings["enc_patch_size"],
        "num_latent_tokens": settings["num_latent_tokens"],
        "latent_channels": settings["codebook_embed_dim"],
        "decoder_type": "modulated" if "movqv2" in settings["decoder_model"] else "plain",
        "decoder_class_token": settings["dec_cls_token"],
        "rope_type": "learned",
        "rope_theta": settings["rope_theta"],
    }
    for half in ("encoder", "decoder"):
        width = state[f"{half}.latent_pos_embed"].shape[-1]
        found[f"{half}_hidden_size"] = width
        found[f"{half}_num_layers"] = count_layers(state, f"{half}.model.blocks")
        found[f"{half}_num_attention_heads"] = width // HEAD_DIM
    return found | config


def load_maetok(
    config_file: str | Path, weights: str | Path, dtype: torch.dtype | None = None, **config
) -> AutoencoderMAETok:
    """A published tokenizer, with the statistics of its latents.

    Args:
        config_file: file `config.json`.
        weights: file `model.safetensors`.
        dtype: of the weights; None keeps that of the file.
        config: as in `maetok_config`.

    Raises:
        ValueError: files of another kind, or settings that `AutoencoderMAETok` does not express.
    """
    settings = json.loads(Path(config_file).read_text(encoding="utf-8"))
    state = read_weights(weights)
    config = maetok_config(settings, state, **config)
    heads = (config[f"{half}_num_attention_heads"] for half in ("encoder", "decoder"))
    inference = {key: tensor for key, tensor in state.items() if key.split(".")[0] in PARTS}
    ours = maetok_table(config["patch_size"], *heads).to_ours(inference)
    # Absent where training masked no patches: then nothing reads it.
    ours.setdefault("encoder.mask_token", torch.zeros_like(ours["encoder.class_token"]))
    shape = (config["latent_channels"], 1, 1)
    for name in ("mean", "std"):
        ours[f"latents_{name}"] = torch.full(shape, float(settings[f"vq_{name}"]))
    return build(AutoencoderMAETok, config, ours, dtype)
