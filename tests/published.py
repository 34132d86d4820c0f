"""Tiny publications: the files that a name in the zoo stands for, from oracles, and from tiny models for the rest."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from factories import tiny_detok, tiny_encoder, tiny_kl, tiny_released_maetok
from safetensors.torch import save_file

from hf_fae import AutoencoderDRoRAE, AutoencoderRAEv2
from hf_fae.convert.autoencoder_kl import export_autoencoder_kl
from hf_fae.convert.detok import export_detok
from hf_fae.convert.maetok import maetok_table
from hf_fae.convert.rae import export_rae
from hf_fae.zoo import ZOO, Published


__all__ = ["GENERATORS", "TOKENIZERS", "publish", "published_files"]

# Generator -> the oracle that its file is from.
GENERATORS = {
    "lightningdit-xl-800ep": "lightningdit",
    "dit-dh-xl-256": "ditdh",
    "raev2-dit-xl": "raev2",
    "mar-b-detok": "mar_detok",
    "mar-b": "mar_lth14",
    "sit-xl-maetok-256": "maetok_sit",
    "sit-xl-2": "sit",
    "repa-xl-2": "repa_sit",
    "dit-xl-2-256": None,  # a tiny model of diffusers
    "starflow-3b-text": "starflow_text",
}
TOKENIZERS = ["vavae-f16d32", "rae-dinov2-b", "raev2-dinov3-l-k7", "detok-bb", "maetok-b-256"]
# What weights of these sizes do not show, beside the settings of the row.
SETTINGS = {
    "mar-b-detok": {"num_attention_heads": 4},
    "mar-b": {"num_attention_heads": 4},
    "sit-xl-maetok-256": {"num_attention_heads": 4},
    "sit-xl-2": {"num_attention_heads": 4},
    "repa-xl-2": {"num_attention_heads": 4},
    "dit-xl-2-256": {"num_attention_heads": 2, "sample_size": 8},
    "starflow-3b-text": {"sample_size": 4, "max_caption_length": 5},
    "rae-dinov2-b": {"decoder_num_attention_heads": 3},
    "raev2-dinov3-l-k7": {"decoder_num_attention_heads": 3, "layers": [1, 3]},
    "raev2-dit-xl": {"base_head_layer": 1, "num_inference_steps": 20, "shift": 8.0},
    "detok-bb": {"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 3},
    "detok-bb-tuned": {"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 3},
    "maetok-b-256": {"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2},
}


def publish(name: str, folder: Path, oracle: Callable[[str], Path]) -> dict[str, Published]:
    """Write the files of a name, and of its tokenizer, below the names of their repositories.

    Returns:
        The rows of both, with what their loaders have to know of the tiny sizes.
    """
    rows = {}
    for each in filter(None, (name, ZOO[name].tokenizer)):
        entry = ZOO[each]
        rows[each] = replace(entry, settings={**entry.settings, **SETTINGS.get(each, {})})
        paths = {key: _root(entry, folder) / path for key, path in entry.files.items()}
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        if each == name and name in GENERATORS:
            _write_generator(name, paths, oracle)
        else:
            _write_tokenizer(each, paths, folder, oracle, of=None if each == name else name)
    return rows


@pytest.fixture
def published_files(tmp_path, monkeypatch, oracle):
    """Writes the files of a name and returns their folder; the zoo has the tiny rows in the meantime."""

    def write(name: str) -> Path:
        for key, row in publish(name, tmp_path / "files", oracle).items():
            monkeypatch.setitem(ZOO, key, row)
        return tmp_path / "files"

    return write


def _root(entry, folder):
    return folder if "://" in entry.source else folder / entry.source


def _write_generator(name, paths, oracle):
    if name == "dit-xl-2-256":
        torch.save(_tiny_diffusers_dit().state_dict(), paths["weights"])
        return
    source = oracle(GENERATORS[name])
    path = paths["weights"]
    if path.suffix == ".safetensors":
        save_file(torch.load(source / "checkpoint.pt", weights_only=True), path)
    else:
        shutil.copy(source / "checkpoint.pt", path)
    if "weak_weights" in paths:
        shutil.copy(source / "weak_checkpoint.pt", paths["weak_weights"])


def _tiny_diffusers_dit():
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, out_channels=8
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    # As diffusers saves it, every block has the same embeddings.
    embeddings = model.transformer_blocks[0].norm1.emb.state_dict()
    model.transformer_blocks[1].norm1.emb.load_state_dict(embeddings)
    return model


def _write_tokenizer(name, paths, folder, oracle, of):
    """The tokenizer's own oracle, or, of a generator, a tiny model with its latents."""
    if name.startswith("sd-vae"):
        tiny_kl(shift_factor=None).save_pretrained(folder / ZOO[name].source)
    elif name == "vavae-f16d32":
        shutil.copy(oracle("vavae") / "checkpoint.pt", paths["weights"])
        shutil.copy(oracle("lightningdit") / "latents_stats.pt", paths["statistics"])
    elif name == "kl16":
        vae = tiny_kl(block_out_channels=[32] * 4, norm_num_groups=32, latent_channels=16)
        torch.save({"model": export_autoencoder_kl(vae)}, paths["weights"])
    elif name == "rae-dinov2-b":
        encoder = folder / ZOO[name].models["image_encoder"]
        if of is None:
            shutil.copytree(oracle("rae/dinov2/encoder"), encoder)
            shutil.copy(oracle("rae/dinov2/model.pt"), paths["weights"])
            shutil.copy(oracle("rae/dinov2/stat.pt"), paths["statistics"])
        else:
            of_24 = tiny_encoder("dinov2_with_registers", hidden_size=24)
            vae = _tiny_rae(AutoencoderDRoRAE, of_24, sample_size=64, fusion_type="none")
            vae.image_encoder.save_pretrained(encoder)
            for path, state in zip((paths["weights"], paths["statistics"]), export_rae(vae), strict=True):
                torch.save(state, path)
    elif name == "raev2-dinov3-l-k7":
        encoder = folder / ZOO[name].models["image_encoder"]
        if of is None:
            shutil.copytree(oracle("raev2/encoder"), encoder)
            shutil.copy(oracle("raev2/k2_every_other/decoder.pt"), paths["weights"])
            shutil.copy(oracle("raev2/k2_every_other/stats.pt"), paths["statistics"])
        else:
            of_16 = tiny_encoder("dinov3_vit", hidden_size=16, num_hidden_layers=4)
            vae = _tiny_rae(AutoencoderRAEv2, of_16, sample_size=32, layers=[1, 3])
            vae.image_encoder.save_pretrained(encoder)
            for path, state in zip((paths["weights"], paths["statistics"]), export_rae(vae), strict=True):
                torch.save(state, path)
    elif name.startswith("detok"):
        if of is None:
            shutil.copy(oracle("detok/detok-tiny.pth"), paths["weights"])
            statistics = pickle.loads((oracle("detok") / "stats.pkl").read_bytes())["detok-tiny"]
        else:
            torch.save({"model_ema": export_detok(tiny_detok(**DETOK))}, paths["weights"])
            statistics = {"channel": (torch.linspace(-1, 1, 32), torch.linspace(1, 2, 32))}
        paths["statistics"].write_bytes(pickle.dumps({"detok-BB-gamm3.0-m0.7": statistics}))
    elif of is None:
        for path in paths.values():
            shutil.copy(oracle("maetok") / path.name, path)
    else:
        _write_tiny_maetok(paths, oracle)


DETOK = {"latent_channels": 16, "rotary_as_released": True}


def _tiny_rae(model_class, encoder, **config):
    vae = model_class.from_encoder(
        encoder,
        patch_size=8,
        decoder_hidden_size=48,
        decoder_num_layers=1,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=40,
        **config,
    )
    vae.set_latent_statistics(torch.full_like(vae.latents_mean, 0.1), torch.full_like(vae.latents_std, 1.5))
    return vae


def _write_tiny_maetok(paths, oracle):
    """16 latent tokens of 8 channels, with the settings of the oracle."""
    vae = tiny_released_maetok(
        num_latent_tokens=16, latent_channels=8, decoder_hidden_size=32, decoder_num_attention_heads=2
    )
    settings = json.loads((oracle("maetok") / "config.json").read_text())
    sizes = {"image_size": 32, "enc_patch_size": 8, "dec_patch_size": 8, "num_latent_tokens": 16}
    paths["config_file"].write_text(json.dumps({**settings, **sizes}))
    state = {key: tensor for key, tensor in vae.state_dict().items() if not key.startswith(("latents_", "auxiliary"))}
    published = maetok_table(8, 2, 2).to_published(state)
    save_file({key: tensor.contiguous() for key, tensor in published.items()}, paths["weights"])
