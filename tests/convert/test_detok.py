"""l-DeTok's tokenizer from the files as published, and back."""

import pytest
import torch
from factories import tiny_detok
from parity import arrays, assert_parity, assert_round_trip, published_shapes

from hf_fae import AutoencoderDeTok, build_preset
from hf_fae.convert.detok import detok_config, detok_table, export_detok, load_detok


HEADS = {"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 3}


@pytest.fixture(scope="module")
def folder(oracle):
    return oracle("detok")


@pytest.fixture(scope="module")
def vae(folder):
    return load_detok(folder / "detok-tiny.pth", folder / "stats.pkl", **HEADS)


@pytest.fixture(scope="module")
def io(folder):
    return arrays(folder / "io.npz")


@torch.no_grad()
def test_encode(vae, io):
    posterior = vae.encode(io["pixel_values"]).latent_dist
    assert_parity(posterior.mode(), io["latents_normalised_mean"])
    std = io["latents_std"].view(8, 1, 1)
    assert_parity(posterior.std, io["posterior_std"].mT.unflatten(2, (4, 4)) / std)
    assert_parity(vae.denormalize_latents(posterior.mode()), io["posterior_mean"].mT.unflatten(2, (4, 4)))


@torch.no_grad()
def test_decode(vae, io):
    assert_parity(vae.decode(io["decode_input_normalised"]).sample, io["decode_output"])
    assert_parity(vae.decode(vae.encode(io["pixel_values"]).latent_dist.mode()).sample, io["decode_of_encode"])


@torch.no_grad()
def test_masked_pass(vae, io):
    output = vae(io["pixel_values"], visible_patches=io["kept_patches"])
    assert_parity(output.moments[:, :8, 0].mT, io["masked_posterior_mean"])
    assert_parity(output.sample, io["masked_decode"])


def test_statistics_are_those_of_the_means(folder, vae, io):
    assert torch.equal(vae.latents_mean.flatten(), io["latents_mean"])
    assert torch.equal(vae.latents_std.flatten(), io["latents_std"])
    plain = load_detok(folder / "detok-tiny.pth", **HEADS)
    assert not plain.latents_mean.any() and plain.latents_std.eq(1).all()
    named = load_detok(folder / "detok-tiny.pth", folder / "stats.pkl", "detok-tiny", **HEADS)
    assert torch.equal(named.latents_mean, vae.latents_mean)
    with pytest.raises(
        ValueError, match=r"statistics_key must be one of \['detok-tiny'\] in .*stats.pkl, got 'other'"
    ):
        load_detok(folder / "detok-tiny.pth", folder / "stats.pkl", "other", **HEADS)


def test_config(vae, folder):
    assert vae.config.rotary_as_released and vae.config.noise_gamma == 3.0
    other = load_detok(folder / "detok-tiny.pth", dtype=torch.bfloat16, noise_gamma=0.0, **HEADS)
    assert other.config.noise_gamma == 0.0 and other.dtype == torch.bfloat16
    assert other.latents_mean.dtype == torch.float32


def test_saved_and_loaded(vae, io, tmp_path):
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderDeTok.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(
            loaded.decode(io["decode_input_normalised"]).sample, vae.decode(io["decode_input_normalised"]).sample
        )


def test_export(vae, folder):
    published = torch.load(folder / "detok-tiny.pth", weights_only=True)["model_ema"]
    exported = export_detok(vae)
    assert exported.keys() == published.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in published.items())
    with pytest.raises(ValueError, match="vae must have rotary_as_released True, .* got False"):
        export_detok(tiny_detok())


def test_round_trip():
    assert_round_trip(detok_table(8), tiny_detok())


def test_published_size(oracle):
    published = published_shapes(oracle("published_keys") / "detok_BB.json")
    config = detok_config(published)
    preset = build_preset("detok-bb", device="meta")
    assert all(preset.config[name] == value for name, value in config.items())
    ours = detok_table().to_ours(published)
    expected = {name: tensor.shape for name, tensor in preset.named_parameters()}
    assert {name: tensor.shape for name, tensor in ours.items()} == expected
    assert sum(tensor.numel() for tensor in ours.values()) == 171_712_628
    assert sum(tensor.numel() for tensor in published.values()) == 171_712_628


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "encoder_num_attention_heads must be given for a width that is not published, got 64"),
        ({"encoder_num_attention_heads": 2}, "decoder_num_attention_heads must be given .* got 48"),
    ],
)
def test_unknown_heads(folder, config, message):
    with pytest.raises(ValueError, match=message):
        load_detok(folder / "detok-tiny.pth", **config)


def test_other_families_are_refused(oracle):
    with pytest.raises(
        ValueError, match="checkpoint must be of an l-DeTok tokenizer with the key 'encoder.positional"
    ):
        load_detok(oracle("mar_detok") / "checkpoint.pt")
