"""VA-VAE and KL-16 from their files as published."""

import pytest
import torch
from diffusers import AutoencoderKL
from parity import arrays, assert_parity, assert_round_trip

from hf_fae import build_preset
from hf_fae.convert.autoencoder_kl import (
    autoencoder_kl_config,
    autoencoder_kl_table,
    export_autoencoder_kl,
    load_autoencoder_kl,
)
from hf_fae.latents import decode_latents, encode_images


@pytest.fixture(scope="module")
def checkpoint(oracle):
    return oracle("vavae") / "checkpoint.pt"


@torch.no_grad()
def test_encode_and_decode(oracle, checkpoint):
    io, vae = arrays(oracle("vavae") / "oracle.npz"), load_autoencoder_kl(checkpoint)
    posterior = vae.encode(io["pixels"]).latent_dist
    assert_parity(posterior.parameters, io["moments"])
    assert_parity(vae.decode(posterior.mean).sample, io["reconstruction_of_mean"])


@torch.no_grad()
def test_statistics(oracle, checkpoint, tmp_path):
    """LightningDiT generates z, which the tokenizer decodes from z * std / multiplier + mean."""
    path = oracle("lightningdit") / "latents_stats.pt"
    values = torch.load(path, weights_only=True)
    load_autoencoder_kl(checkpoint, path, scaling_factor=2.0).save_pretrained(tmp_path)
    vae, latents = AutoencoderKL.from_pretrained(tmp_path), torch.randn(1, 4, 4, 4)
    expected = vae.decode(latents * values["std"] / 2 + values["mean"]).sample
    torch.testing.assert_close(decode_latents(vae, latents), expected)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    mean = vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(encode_images(vae, pixels).mean, (mean - values["mean"]) / values["std"] * 2)


def test_settings(checkpoint):
    """KL-16 of MAR has a factor and no statistics."""
    vae = load_autoencoder_kl(checkpoint, scaling_factor=0.2325, sample_size=32, dtype=torch.float16)
    assert vae.dtype == torch.float16 and not vae.training
    assert (vae.config.scaling_factor, vae.config.sample_size, vae.config.latents_mean) == (0.2325, 32, None)


def test_nesting_of_mar(checkpoint, tmp_path):
    """Its file has the weights under `model`, and other keys are of no use."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({"model": {**state, "unknown.weight": torch.zeros(3)}}, tmp_path / "kl16.ckpt")
    nested, flat = load_autoencoder_kl(tmp_path / "kl16.ckpt"), load_autoencoder_kl(checkpoint)
    assert all(torch.equal(value, flat.state_dict()[key]) for key, value in nested.state_dict().items())


def test_export(checkpoint):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    exported = export_autoencoder_kl(load_autoencoder_kl(checkpoint))
    assert state.keys() - exported.keys() == {"loss.logvar", "linear_proj.weight"}
    assert all(torch.equal(value, state[key]) for key, value in exported.items())


@pytest.mark.parametrize("attention", [True, False])
def test_round_trip(attention):
    """Three levels of different widths, so that some blocks have shortcuts."""
    up = ["AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=up,
        block_out_channels=[32, 32, 64],
        layers_per_block=2,
        latent_channels=3,
    )
    assert_round_trip(autoencoder_kl_table(3), model)
    config = autoencoder_kl_config(export_autoencoder_kl(model))
    assert config == {key: model.config[key] for key in config}


def published_shapes(latent_channels: int, decoder_attention: bool) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of VA-VAE's file, or of KL-16's, which lacks attention in the decoder's levels."""
    shapes, channels = {}, [128, 128, 256, 256, 512]

    def add(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def resnet(name, inputs, outputs):
        add(f"{name}.norm1", inputs)
        add(f"{name}.conv1", outputs, inputs, 3, 3)
        add(f"{name}.norm2", outputs)
        add(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            add(f"{name}.nin_shortcut", outputs, inputs, 1, 1)

    def attention(name):
        add(f"{name}.norm", 512)
        for one in ("q", "k", "v", "proj_out"):
            add(f"{name}.{one}", 512, 512, 1, 1)

    for side, inputs, outputs, first, last in (
        ("encoder", 3, 2 * latent_channels, 128, 512),
        ("decoder", latent_channels, 3, 512, 128),
    ):
        add(f"{side}.conv_in", first, inputs, 3, 3)
        resnet(f"{side}.mid.block_1", 512, 512)
        attention(f"{side}.mid.attn_1")
        resnet(f"{side}.mid.block_2", 512, 512)
        add(f"{side}.norm_out", last)
        add(f"{side}.conv_out", outputs, last, 3, 3)
    width = 128
    for level in range(5):
        for j in range(2):
            resnet(f"encoder.down.{level}.block.{j}", width, channels[level])
            width = channels[level]
            if level == 4:
                attention(f"encoder.down.{level}.attn.{j}")
        if level < 4:
            add(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    for level in reversed(range(5)):
        for j in range(3):
            resnet(f"decoder.up.{level}.block.{j}", width, channels[level])
            width = channels[level]
            if level == 4 and decoder_attention:
                attention(f"decoder.up.{level}.attn.{j}")
        if level > 0:
            add(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    add("quant_conv", 2 * latent_channels, 2 * latent_channels, 1, 1)
    add("post_quant_conv", latent_channels, latent_channels, 1, 1)
    return shapes


@pytest.mark.parametrize(
    "name, shapes", [("vavae-f16d32", published_shapes(32, True)), ("kl-f16d16", published_shapes(16, False))]
)
def test_published_size(name, shapes):
    """Every published key has its place in the preset, and every weight of the preset is filled."""
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config, preset = autoencoder_kl_config(state), build_preset(name, device="meta")
    assert config == {key: preset.config[key] for key in config}
    ours = autoencoder_kl_table(5).to_ours(state)
    assert {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in preset.state_dict().items()}
    assert {key: value.shape for key, value in export_autoencoder_kl(preset).items()} == shapes
    if name == "vavae-f16d32":
        assert round(sum(value.numel() for value in ours.values()) / 1e6, 2) == 69.84


class TestBadInput:
    def test_other_families(self, oracle):
        with pytest.raises(ValueError, match="checkpoint must be of LDM's autoencoders with the key 'encoder.conv_in"):
            load_autoencoder_kl(oracle("sit") / "checkpoint.pt")

    def test_statistics_of_other_channels(self, checkpoint, tmp_path):
        torch.save({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, tmp_path / "stats.pt")
        with pytest.raises(ValueError, match="stats.pt must hold mean and std of 4 channels, got {'mean': "):
            load_autoencoder_kl(checkpoint, tmp_path / "stats.pt")
