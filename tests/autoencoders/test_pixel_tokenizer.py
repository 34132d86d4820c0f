"""The base of tokenizers that encode pixels."""

import pytest
import torch
from factories import tiny_detok, tiny_maetok


@pytest.mark.parametrize("make", [tiny_detok, tiny_maetok])
@torch.no_grad()
def test_latents_are_normalised(make):
    vae, images = make(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = vae.encode(images).latent_dist.mode()
    image, raw = vae.decode(latents).sample, vae.denormalize_latents(latents)
    vae.set_latent_statistics(raw.mean((0, 2, 3)).view(4, 1, 1), raw.std((0, 2, 3)).view(4, 1, 1))
    normalised = vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(normalised).sample, image, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("make", "latents"), [(tiny_detok, (1, 4, 32, 32)), (tiny_maetok, (1, 4, 1, 6))])
@torch.no_grad()
def test_512_px(make, latents):
    """1024 patches of 16 pixels; MAETok's latents stay as many."""
    vae, images = make(sample_size=512, patch_size=16), torch.rand(1, 3, 512, 512) * 2 - 1
    posterior = vae.encode(images).latent_dist
    assert posterior.mode().shape == latents and vae.encoder.proj_in(images).flatten(2).shape[2] == 1024
    torch.testing.assert_close(vae.decode(posterior.mode()).sample, vae(images).sample, atol=1e-4, rtol=1e-4)
