"""RAE's published files: what the reference code computes with them, and files in their layout back."""

import json
import math

import numpy as np
import pytest
import torch

from hf_fae import PRESETS, AutoencoderDRoRAE, VisionEncoder, build_preset
from hf_fae.convert.rae import export_rae, load_rae, rae_config, rae_table


HEADS = 3  # of the oracles' decoders


@pytest.fixture(params=["dinov2", "siglip2", "mae"])
def folder(request, oracle):
    return oracle(f"rae/{request.param}")


def load(folder, **config):
    encoder = VisionEncoder.from_pretrained(folder / "encoder")
    return load_rae(folder / "model.pt", folder / "stat.pt", encoder, HEADS, **config)


def assert_close(ours, theirs):
    """To 1e-5 of the largest number."""
    theirs = torch.as_tensor(theirs)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_latents_and_images_are_those_of_the_reference(folder):
    vae, expected = load(folder), np.load(folder / "io.npz")
    pixels = 2 * torch.from_numpy(expected["pixel_values_01"]) - 1
    latents = vae.encode(pixels).latent_dist.mode()
    assert_close(latents, expected["latents_normalised"])
    assert_close(vae.decode_features(latents), expected["encoder_tokens"])
    decoded = vae.decode(torch.from_numpy(expected["decode_input_normalised"])).sample
    assert_close(decoded / 2 + 0.5, expected["decode_output_01"])
    assert_close(vae(pixels).sample / 2 + 0.5, expected["reconstruction_01"])


@torch.no_grad()
def test_saved_and_loaded_again(folder, tmp_path):
    vae, pixels = load(folder), 2 * torch.rand(1, 3, 64, 64) - 1
    vae.save_pretrained(tmp_path)
    assert torch.equal(AutoencoderDRoRAE.from_pretrained(tmp_path)(pixels).sample, vae(pixels).sample)


def test_published_files_come_back(oracle, tmp_path):
    folder = oracle("rae/dinov2")
    vae = load(folder)
    decoder, statistics = export_rae(vae)
    published = torch.load(folder / "model.pt", weights_only=True)
    assert decoder.keys() == published.keys()  # the fixed table and the class token included
    assert all(torch.equal(decoder[name], published[name]) for name in published)
    for name, value in torch.load(folder / "stat.pt", weights_only=True).items():
        torch.testing.assert_close(statistics[name], value, atol=1e-6, rtol=1e-6)

    torch.save(decoder, tmp_path / "model.pt")
    torch.save(statistics, tmp_path / "stat.pt")
    again = load_rae(tmp_path / "model.pt", tmp_path / "stat.pt", None, HEADS).state_dict()
    for name, value in again.items():
        assert torch.equal(value, vae.state_dict()[name]) or name == "latents_std"
    torch.testing.assert_close(again["latents_std"], vae.latents_std, atol=0, rtol=2e-7)


def test_averaged_decoder_of_a_training_checkpoint(oracle, tmp_path):
    folder = oracle("rae/mae")
    decoder = torch.load(folder / "model.pt", weights_only=True)
    raw = {f"module.decoder.{name}": torch.zeros_like(value) for name, value in decoder.items()}
    averaged = {f"module._orig_mod.decoder.{name}": value for name, value in decoder.items()}
    averaged["module._orig_mod.encoder.layer.weight"] = torch.zeros(1)
    torch.save({"model": raw, "ema": averaged, "step": 7}, tmp_path / "checkpoint.pt")
    vae = load_rae(tmp_path / "checkpoint.pt", decoder_num_attention_heads=HEADS)
    assert torch.equal(vae.decoder.proj_in.weight, decoder["decoder_embed.weight"])
    assert (vae.latents_mean == 0).all() and (vae.latents_std == 1).all()


def test_half_precision_keeps_the_statistics(oracle):
    vae = load(oracle("rae/dinov2"), dtype=torch.bfloat16)
    assert vae.decoder.proj_in.weight.dtype == torch.bfloat16
    assert vae.latents_std.dtype == vae.decoder.pos_embed.table.dtype == torch.float32


@pytest.mark.parametrize("part", ["mean", "var"])
def test_one_half_of_the_statistics(oracle, tmp_path, part):
    folder = oracle("rae/dinov2")
    statistics = torch.load(folder / "stat.pt", weights_only=True)
    torch.save({part: statistics[part]}, tmp_path / "stat.pt")
    vae = load_rae(folder / "model.pt", tmp_path / "stat.pt", None, HEADS)
    mean = statistics["mean"] if part == "mean" else torch.zeros(32, 4, 4)
    std = (statistics["var"] + 1e-5).sqrt() if part == "var" else torch.ones(32, 4, 4)
    torch.testing.assert_close(vae.latents_mean, mean)
    torch.testing.assert_close(vae.latents_std, std)


@pytest.mark.parametrize("grid, preset", [(16, "rae-dinov2-b"), (32, "rae-dinov2-b-512")])
def test_published_sizes(oracle, grid, preset):
    """Every published key is placed, and every weight of ours is filled."""
    keys = json.loads((oracle("published_keys") / f"rae_decoder_XL_768_{grid}.json").read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    vae = build_preset(preset, device="meta")
    found = rae_config(state)
    assert {name: vae.config[name] for name in found} == found
    state |= {name: torch.empty(768, grid, grid, device="meta") for name in ("mean", "var")}
    ours = {name: tuple(value.shape) for name, value in rae_table().to_ours(state).items()}
    assert ours == {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    placed = sum(math.prod(shape) for name, shape in keys.items() if name != "decoder_pos_embed")
    assert sum(parameter.numel() for parameter in vae.parameters()) == placed


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("rae-")])
def test_presets_are_arguments(oracle, name):
    """A preset's decoder loads with its arguments; the oracle is smaller, which is the error."""
    folder = oracle("rae/dinov2")
    with pytest.raises(ValueError, match="of shape .* for this AutoencoderDRoRAE, got"):
        load_rae(folder / "model.pt", None, None, HEADS, **PRESETS[name][1])


class TestBadInput:
    @pytest.fixture
    def state(self, oracle):
        return torch.load(oracle("rae/dinov2") / "model.pt", weights_only=True)

    def test_trained_positions(self, state):
        state["decoder_pos_embed"][0, 3, 5] += 1e-3
        with pytest.raises(ValueError, match="decoder_pos_embed must be the fixed sin-cos table, got one 1.0e-03 off"):
            rae_config(state, HEADS)

    def test_position_of_the_class_token(self, state):
        state["decoder_pos_embed"][0, 0, 0] = 1
        with pytest.raises(
            ValueError, match=r"decoder_pos_embed must be the fixed sin-cos table, got one 1.0e\+00 off"
        ):
            rae_config(state, HEADS)

    def test_unknown_width(self, state):
        with pytest.raises(ValueError, match="decoder_num_attention_heads must be given for a decoder of width 48"):
            rae_config(state)

    def test_another_family(self):
        with pytest.raises(ValueError, match=r"checkpoint must be a decoder of RAE, got keys such as \['weight'\]"):
            rae_config({"weight": torch.ones(1)})

    def test_images_that_are_not_square(self, state):
        state["decoder_pos_embed"] = state["decoder_pos_embed"][:, :13]
        with pytest.raises(ValueError, match="decoder_pos_embed must be that of a square grid, got 12 patches"):
            rae_config(state, HEADS)

    def test_statistics_of_another_size(self, oracle, tmp_path):
        torch.save({"mean": torch.zeros(32, 8, 8), "var": torch.ones(32, 8, 8)}, tmp_path / "stat.pt")
        with pytest.raises(ValueError, match=r"'latents_mean' of shape \(32, 4, 4\) .* got \(32, 8, 8\)"):
            load_rae(oracle("rae/dinov2") / "model.pt", tmp_path / "stat.pt", None, HEADS)
