"""diffusers' `AutoencoderRAE` and ours: the same weights in both."""

import pytest
import torch
from diffusers import AutoencoderRAE
from factories import tiny_encoder

from hf_fae import AutoencoderDRoRAE


@pytest.fixture(scope="module")
def published():
    """A diffusers `AutoencoderRAE` of 256 px images, as small as it gets, with weights and statistics of its own."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        rae = AutoencoderRAE(
            encoder_hidden_size=64,
            encoder_num_hidden_layers=3,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=80,
            latents_mean=torch.randn(64, 16, 16),
            latents_std=torch.rand(64, 16, 16) + 0.5,
        ).eval()
        for parameter in rae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return rae


def images():
    return torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_latents_and_pixels(published):
    vae, pixels = AutoencoderDRoRAE.from_rae(published), images()
    latents = published.encode(pixels).latent
    torch.testing.assert_close(vae.encode(pixels * 2 - 1).latent_dist.mode(), latents, atol=1e-4, rtol=0)
    theirs = published.decode(latents).sample
    torch.testing.assert_close(vae.decode(latents).sample / 2 + 0.5, theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_there_and_back(published, tmp_path):
    AutoencoderDRoRAE.from_rae(published).to_rae().save_pretrained(tmp_path)
    loaded, pixels = AutoencoderRAE.from_pretrained(tmp_path), images()
    for name, value in published.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)
    torch.testing.assert_close(loaded(pixels).sample, published(pixels).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_saved_with_its_encoder(published, tmp_path):
    vae, pixels = AutoencoderDRoRAE.from_rae(published), images() * 2 - 1
    vae.save_pretrained(tmp_path)
    assert torch.equal(AutoencoderDRoRAE.from_pretrained(tmp_path)(pixels).sample, vae(pixels).sample)


def test_is_phase_one_of_drorae(published):
    vae = AutoencoderDRoRAE.from_rae(
        published, fusion_type="experts", fusion_layers=3, expert_hidden_size=32, fusion_weight=0.2
    )
    assert len(vae.fusion.experts) == 3
    assert torch.equal(vae.decoder.proj_in.weight, published.decoder.decoder_embed.weight)


def test_what_has_no_counterpart(published):
    other = AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, scaling_factor=0.5
    )
    with pytest.raises(ValueError, match="rae must have reshape_to_2d and scaling_factor 1, got True and 0.5"):
        AutoencoderDRoRAE.from_rae(other)
    vae = AutoencoderDRoRAE.from_encoder(
        tiny_encoder("dinov2"),
        sample_size=32,
        patch_size=8,
        fusion_type="none",
        decoder_hidden_size=32,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
    )
    with pytest.raises(ValueError, match="image_encoder must be one of .*, got 'dinov2'"):
        vae.to_rae()
