"""RAEv2's tokenizers from their files as published, with encoders in transformers' and in Meta's format."""

import json
import math

import pytest
import torch
from parity import arrays, assert_parity

from hf_fae import AutoencoderRAEv2, VisionEncoder, build_preset
from hf_fae.convert.dinov3 import dinov3_config, dinov3_table, load_dinov3
from hf_fae.convert.rae import decoder_config, export_rae, rae_table
from hf_fae.convert.raev2 import load_raev2


HEADS = 3  # of the oracles' decoders
# Folder -> what the reference's name of the encoder says.
SETTINGS = {
    "k1": {"layers": [3], "add_spatial_mean": False},
    "k3_last_consecutive": {"layers": [1, 2, 3]},
    "k2_every_other": {"layers": [1, 3]},
}


@pytest.fixture(params=SETTINGS)
def name(request) -> str:
    return request.param


def load(folder, name, encoder="encoder", **config):
    files = (folder / name / file for file in ("decoder.pt", "stats.pt"))
    return load_raev2(*files, folder / encoder, HEADS, **SETTINGS[name], **config)


@pytest.mark.parametrize("encoder", ["encoder", "dinov3_meta_format.pth"])
@torch.no_grad()
def test_latents_and_images_are_those_of_the_reference(oracle, name, encoder):
    folder = oracle("raev2")
    vae, io = load(folder, name, encoder), arrays(folder / name / "io.npz")
    pixels = 2 * io["pixel_values_01"] - 1
    latents = vae.encode(pixels).latent_dist.mode()
    assert_parity(latents, io["latents_normalised"])
    assert_parity(vae.decode_features(latents), io["encoder_tokens"])
    assert_parity(vae.decode(io["decode_input_normalised"]).sample / 2 + 0.5, io["decode_output_01"])
    assert_parity(vae(pixels).sample / 2 + 0.5, io["reconstruction_01"])


@torch.no_grad()
def test_one_layer_with_the_spatial_mean_is_another_tokenizer(oracle):
    folder = oracle("raev2")
    io = arrays(folder / "k1" / "io.npz")
    vae = load_raev2(folder / "k1" / "decoder.pt", None, folder / "encoder", HEADS, layers=[3])
    tokens = vae.extract_features(2 * io["pixel_values_01"] - 1)[0]
    expected = io["encoder_tokens"]
    assert_parity(tokens, expected + expected.mean(1, keepdim=True))
    assert (tokens - expected).abs().max() > 0.1 * expected.abs().max()


@torch.no_grad()
def test_saved_and_loaded_again(oracle, name, tmp_path):
    vae, pixels = load(oracle("raev2"), name), 2 * torch.rand(1, 3, 64, 64) - 1
    vae.save_pretrained(tmp_path)
    assert torch.equal(AutoencoderRAEv2.from_pretrained(tmp_path)(pixels).sample, vae(pixels).sample)


def test_published_files_come_back(oracle, name):
    folder = oracle("raev2")
    decoder, statistics = export_rae(load(folder, name))
    published = torch.load(folder / name / "decoder.pt", weights_only=True)
    assert decoder.keys() == published.keys()
    assert all(torch.equal(decoder[key], value) for key, value in published.items())
    for key, value in torch.load(folder / name / "stats.pt", weights_only=True).items():
        torch.testing.assert_close(statistics[key], value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("preset", ["raev2-dinov3-l-k1", "raev2-dinov3-l-k7", "raev2-dinov3-l-k23"])
def test_published_size(oracle, preset):
    """Every published key is placed, and every weight of ours is filled."""
    keys = json.loads((oracle("published_keys") / "raev2_decoder_XL_1024_16.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    vae = build_preset(preset, device="meta")
    found = decoder_config(state)
    assert {key: vae.config[key] for key in found} == found
    state |= {key: torch.empty(1024, 16, 16, device="meta") for key in ("mean", "var")}
    ours = {key: value.shape for key, value in rae_table().to_ours(state).items()}
    assert ours == {key: value.shape for key, value in vae.state_dict().items()}
    placed = sum(math.prod(shape) for key, shape in keys.items() if key != "decoder_pos_embed")
    assert sum(parameter.numel() for parameter in vae.parameters()) == placed == 415_351_552
    assert sum(map(math.prod, keys.values())) == 415_647_616


class TestDINOv3:
    def test_weights_are_those_of_the_hub(self, oracle):
        folder = oracle("raev2")
        ours, theirs = (
            load_dinov3(folder / "dinov3_meta_format.pth", 64),
            VisionEncoder.from_pretrained(folder / "encoder"),
        )
        configs = [{**encoder.config["model"], "architectures": None} for encoder in (ours, theirs)]
        assert configs[0] == configs[1]
        assert (ours.image_mean, ours.image_std) == (theirs.image_mean, theirs.image_std)
        weights = theirs.state_dict()
        assert ours.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in ours.state_dict().items())

    def test_round_trip(self, oracle):
        state = torch.load(oracle("raev2") / "dinov3_meta_format.pth", weights_only=True)
        table = dinov3_table()
        back = table.to_published(table.to_ours(state))
        for key, value in back.items():
            value = value * state[f"{key}_mask"] if f"{key}_mask" in state else value
            expected = state[key] * state[f"{key}_mask"] if f"{key}_mask" in state else state[key]
            assert torch.equal(value, expected), key

    def test_published_size(self):
        """Section 1 of the specification: Meta's file has a key bias more, which is masked."""
        encoder_config = build_preset("raev2-dinov3-l-k7", device="meta").config.image_encoder_config
        with torch.device("meta"):
            encoder = VisionEncoder.from_config(encoder_config)
        assert sum(parameter.numel() for parameter in encoder.parameters()) == 303_129_600
        state = {
            key.removeprefix("model.").replace("model.layer", "layer"): v for key, v in encoder.state_dict().items()
        }
        published = dinov3_table().to_published(state)
        assert sum(tensor.numel() for tensor in published.values()) == 303_154_176
        published["rope_embed.periods"] = torch.empty(16, device="meta")
        assert {key: encoder_config["model"][key] for key in dinov3_config(published)} == dinov3_config(published)

    def test_other_families(self, oracle):
        with pytest.raises(ValueError, match="checkpoint must be of DINOv3 with the key 'storage_tokens'"):
            load_dinov3(oracle("sit") / "checkpoint.pt")
