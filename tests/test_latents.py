"""Latents of diffusers' own autoencoders, as normalised as ours. (Slices, tiles: autoencoders/test_fae.py.)"""

import pytest
import torch
from factories import tiny_detok, tiny_fae, tiny_kl, tiny_maetok

from hf_fae.latents import (
    compression_ratio,
    decode_latents,
    encode_images,
    image_size,
    latent_size,
    latent_statistics,
)


IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).sin()


@pytest.mark.parametrize("shift", [None, 0.25])
def test_scaling_factor_is_that_of_diffusers_pipelines(shift):
    vae = tiny_kl(shift_factor=shift)
    with torch.no_grad():
        raw = vae.encode(IMAGES).latent_dist
        posterior = encode_images(vae, IMAGES)
        torch.testing.assert_close(posterior.mode(), (raw.mode() - (shift or 0)) * vae.config.scaling_factor)
        torch.testing.assert_close(posterior.std, raw.std * vae.config.scaling_factor)
        torch.testing.assert_close(decode_latents(vae, posterior.mode()), vae.decode(raw.mode()).sample)


def test_statistics_of_channels():
    """As SDXL's playground checkpoints have them, beside the factor."""
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 3.0, 4.0]
    found = latent_statistics(tiny_kl(shift_factor=None, latents_mean=mean, latents_std=std, scaling_factor=0.5))
    assert torch.equal(found[0].flatten(), torch.tensor(mean)) and torch.equal(
        found[1].flatten(), 2 * torch.tensor(std)
    )
    assert found[0].shape == found[1].shape == (4, 1, 1)


def test_ours_normalise_by_themselves():
    vae = tiny_fae()
    with torch.no_grad():
        mode = vae.encode(IMAGES).latent_dist.mode()
        assert torch.equal(encode_images(vae, IMAGES).mode(), mode)
        assert torch.equal(decode_latents(vae, mode), vae.decode(mode).sample)
    assert latent_statistics(vae) == (vae.latents_mean, vae.latents_std)


def test_half_precision():
    vae = tiny_kl().to(torch.bfloat16)
    assert decode_latents(vae, torch.zeros(1, 4, 4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [tiny_fae, tiny_kl, tiny_detok, tiny_maetok])
def test_sizes(make):
    vae = make()
    size = tuple(encode_images(vae, IMAGES).mode().shape[2:])
    assert latent_size(vae, 32, 32) == size and image_size(vae, *size) == (32, 32)


@pytest.mark.parametrize("make", [tiny_fae, tiny_kl, tiny_detok])
def test_compression_ratio(make):
    vae = make()
    assert encode_images(vae, IMAGES).mode().shape[-1] * compression_ratio(vae) == 32
