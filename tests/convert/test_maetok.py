"""MAETok's tokenizer from the files as published."""

import json

import pytest
import torch
from factories import tiny_maetok, tiny_released_maetok
from parity import arrays, assert_parity, assert_round_trip, published_shapes

from hf_fae import AutoencoderMAETok, build_preset
from hf_fae.convert.maetok import DROPPED, load_maetok, maetok_config, maetok_table


HEADS = {"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2}  # of another width than the published 64


@pytest.fixture(scope="module", params=["maetok", "maetok/dec_cls_token"])
def folder(request, oracle):
    return oracle(request.param)


def load(folder, **config):
    return load_maetok(folder / "config.json", folder / "model.safetensors", **HEADS, **config)


@torch.no_grad()
def test_parity(folder):
    vae, io = load(folder), arrays(folder / "io.npz")
    latents = vae.encode(io["pixel_values"]).latent_dist.mode()
    assert_parity(latents, io["latents_normalised"].mT[:, :, None])
    assert_parity(vae.denormalize_latents(latents), io["latents_unnormalised"].mT[:, :, None])
    assert_parity(vae.decode(io["decode_input_normalised"].mT[:, :, None]).sample, io["decode_output"])
    assert_parity(vae(io["pixel_values"]).sample, io["reconstruction"])


def test_config(folder):
    settings = json.loads((folder / "config.json").read_text())
    vae = load(folder, dtype=torch.bfloat16)
    assert vae.config.decoder_class_token == settings["dec_cls_token"]
    assert vae.latents_mean.eq(settings["vq_mean"]).all() and vae.latents_std.eq(settings["vq_std"]).all()
    assert vae.dtype == torch.bfloat16
    assert vae.latents_std.dtype == vae.encoder.rotary.frequencies.dtype == torch.float32


def test_saved_and_loaded(folder, tmp_path):
    vae, latents = load(folder), torch.randn(1, 8, 1, 6)
    vae.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        assert torch.equal(AutoencoderMAETok.from_pretrained(tmp_path).decode(latents).sample, expected)


@pytest.mark.parametrize(
    "vae",
    [tiny_released_maetok(), tiny_maetok(rope_type="learned", decoder_class_token=True)],
    ids=["modulated", "plain with class token"],
)
def test_round_trip(vae):
    assert_round_trip(maetok_table(8, 2, 3), vae)


@pytest.mark.parametrize("size", [256, 512])
def test_published_size(oracle, size):
    published = published_shapes(oracle("published_keys") / f"maetok_b_128_{size}.json")
    settings = json.loads((oracle("maetok") / "config.json").read_text())
    settings |= {"image_size": size, "num_latent_tokens": 128, "codebook_embed_dim": 32}
    config = maetok_config(settings, published)
    preset = build_preset("maetok-b-128" if size == 256 else "maetok-b-128-512", device="meta")
    assert all(preset.config[name] == value for name, value in config.items())
    table = maetok_table(16, 12, 12)
    ours = table.to_ours(published)
    expected = {name: tensor.shape for name, tensor in preset.named_parameters()}
    assert {name: tensor.shape for name, tensor in ours.items()} == expected
    # What is dropped, and the position of the class token, which is added to that.
    unused = [name for name in published if any(rule.fullmatch(name) for rule in table.dropped)]
    assert len(unused) == 4 + 2 + 1 + 2 and len(DROPPED) == 4
    count = sum(tensor.numel() for tensor in ours.values())
    assert count + 768 + sum(published[name].numel() for name in unused) == sum(t.numel() for t in published.values())


def test_defaults_are_no_statistics(oracle, tmp_path):
    """The numbers 0 and 1, which JSON may hold as whole ones."""
    folder = oracle("maetok")
    settings = json.loads((folder / "config.json").read_text()) | {"vq_mean": 0, "vq_std": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    vae = load_maetok(tmp_path / "config.json", folder / "model.safetensors", **HEADS)
    assert vae.latents_mean.dtype == vae.latents_std.dtype == torch.float32
    latents = torch.randn(1, 8, 1, 6)
    assert torch.equal(vae.denormalize_latents(latents), latents)


BAD = {
    "absolute": ({"use_rope": False}, "config must have use_rope True, got False"),
    "axial": ({"rope_mixed": False}, "config must have rope_mixed True, got False"),
    "pixels": ({"to_pixel": "siren"}, "config must have to_pixel 'linear', got 'siren'"),
    "lora": ({"enc_tuning_method": "lora"}, "config must have enc_tuning_method 'full', got 'lora'"),
    "patches": ({"dec_patch_size": 8}, "config must have dec_patch_size 16, got 8"),
    "cnn": ({"enc_type": "cnn"}, "config must have enc_type 'vit', got 'cnn'"),
    "registers": (
        {"encoder_model": "vit_base_patch14_reg4_dinov2.lvd142m"},
        "config must have a plain DINOv2 ViT as its encoder_model, got 'vit_base_patch14_reg4_dinov2.lvd142m'",
    ),
    "movq": (
        {"decoder_model": "vit_tiny_patch14_dinov2_movq"},
        "config must have a plain DINOv2 ViT as its decoder_mo",
    ),
    "missing": ({"vq_std": None}, "config must have the settings of a MAETok tokenizer, got none for 'vq_std'"),
}


@pytest.mark.parametrize("settings, message", BAD.values(), ids=BAD)
def test_refusals(oracle, tmp_path, settings, message):
    folder = oracle("maetok")
    changed = json.loads((folder / "config.json").read_text()) | settings
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        load_maetok(tmp_path / "config.json", folder / "model.safetensors", **HEADS)


def test_other_families_are_refused(oracle):
    with pytest.raises(
        ValueError, match="checkpoint must be of a MAETok tokenizer with the key 'encoder.latent_tokens'"
    ):
        load_maetok(oracle("maetok") / "config.json", oracle("lightningdit") / "checkpoint.pt")
