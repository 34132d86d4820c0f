"""VA-VAE's losses against its reference code and plain formulas."""

import numpy as np
import pytest
import torch
from factories import tiny_encoder
from torch.nn import functional as F

from hf_fae.losses.alignment import LatentAlignment, distance_matrix_loss, marginal_cosine_loss
from hf_fae.losses.gan import adaptive_weight


@pytest.fixture(scope="module")
def values(oracle):
    with np.load(oracle("vavae_losses") / "vavae_losses.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize(("margins", "name"), [((0.0, 0.0), "m0"), ((0.5, 0.25), "m")])
def test_losses(values, margins, name):
    projected, features = values["z_projected"], values["features"]
    cosine = marginal_cosine_loss(projected, features, margins[0])
    distance = distance_matrix_loss(projected, features, margins[1])
    torch.testing.assert_close(cosine, values[f"mcos_{name}"])
    torch.testing.assert_close(distance, values[f"mdms_{name}"])
    torch.testing.assert_close(cosine + distance, values[f"vf_{name}"])


def test_plain_formulas():
    latents, features = torch.randn(2, 6, 2, 3), torch.randn(2, 8, 2, 3)
    total = torch.zeros(())
    for z, f in zip(latents.flatten(2).transpose(1, 2), features.flatten(2).transpose(1, 2), strict=True):
        for i in range(6):
            for j in range(6):
                difference = F.cosine_similarity(z[i], z[j], dim=0) - F.cosine_similarity(f[i], f[j], dim=0)
                total += (difference.abs() - 0.1).clamp_min(0)
    torch.testing.assert_close(distance_matrix_loss(latents, features, 0.1), total / 72)
    assert marginal_cosine_loss(features, 3 * features, 0.0) == pytest.approx(0, abs=1e-6)
    assert marginal_cosine_loss(features, -features, 0.0) == pytest.approx(2)


def test_adaptive_weight(values):
    """The gradients of both losses in a weight are those of the reference."""
    weight = torch.zeros_like(values["grad_nll"], requires_grad=True)
    losses = [(weight * values[name]).sum() for name in ("grad_nll", "grad_vf")]
    found = 0.1 * adaptive_weight(*losses, weight, eps=1e-4, largest=1e8)
    torch.testing.assert_close(found, values["adaptive_weight"].to(found))
    none = 0.1 * adaptive_weight(losses[0], 0 * losses[1], weight, eps=1e-4, largest=1e8)
    torch.testing.assert_close(none, values["adaptive_weight_zero_vf_grad"].to(none))


def test_module():
    """Features of the images as they are, on the grid of the latents; the projection alone is trained."""
    encoder = tiny_encoder()
    alignment, images = LatentAlignment(encoder, 4, 0.0, 0.0), torch.rand(2, 3, 48, 48) * 2 - 1
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    loss = alignment(latents, images)
    assert encoder.image_mean == encoder.image_std == [0.5, 0.5, 0.5]
    features = encoder(images, (3, 5)).last_hidden_state.transpose(1, 2).unflatten(2, (3, 5))
    projected = F.conv2d(latents, alignment.projection.weight)
    expected = marginal_cosine_loss(projected, features, 0.0) + distance_matrix_loss(projected, features, 0.0)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert latents.grad.abs().sum() > 0
    assert {name for name, p in alignment.named_parameters() if p.grad is not None} == {"projection.weight"}
