"""The objective of AutoencoderKL, plain and aligned."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import tiny_encoder, tiny_kl
from objective_inputs import batch, numbers
from torch import nn
from torch.nn import functional as F

from hf_fae.losses.alignment import LatentAlignment, distance_matrix_loss, marginal_cosine_loss
from hf_fae.objectives.fae import kl_divergence
from hf_fae.objectives.vae import VAEObjective


def test_plain_loss():
    vae, examples = tiny_kl(), batch()
    losses = VAEObjective(vae, kl_weight=0.1)(examples, numbers())
    posterior = vae.encode(examples["pixel_values"]).latent_dist
    latents = posterior.mean + posterior.std * numbers().normal(*posterior.mean.shape)
    reconstruction = F.mse_loss(vae.decode(latents).sample / 2, examples["pixel_values"] / 2)
    kl = kl_divergence(posterior.mean, posterior.logvar)
    torch.testing.assert_close(losses["loss"], reconstruction + 0.1 * kl)


def test_the_alignment_reaches_the_encoder_with_its_share_of_the_gradient():
    vae, examples = tiny_kl(), batch()
    alignment = LatentAlignment(tiny_encoder(), vae.config.latent_channels, 0.0, 0.0)
    objective = VAEObjective(vae, kl_weight=0.0, alignment=alignment, alignment_weight=0.5)
    losses, weight = objective(examples, numbers()), vae.encoder.conv_out.weight
    whole, reconstruction = (
        torch.autograd.grad(losses[name], weight, retain_graph=True)[0] for name in ("loss", "reconstruction")
    )
    assert (whole - reconstruction).norm().item() == pytest.approx(0.5 * reconstruction.norm().item(), rel=1e-2)
    losses["loss"].backward()
    trained = {name.split(".")[0] for name, p in objective.named_parameters() if p.grad is not None}
    assert trained == {"model", "alignment"}
    groups = objective.parameter_groups()
    assert [group.get("name") for group in groups] == [None, "alignment"]
    assert not any(p.requires_grad for p in alignment.encoder.parameters())


def test_end_to_end_as_the_reference(oracle):
    """Total loss and gradient of a tiny encoder and decoder; its sums are our means times their numbers."""
    with np.load(oracle("vavae_losses") / "vavae_losses.npz") as file:
        values = {name: torch.from_numpy(file[name]) for name in file.files}
    weight = values["e2e_conv_out_weight"].clone().requires_grad_()
    model = SimpleNamespace(encoder=SimpleNamespace(conv_out=SimpleNamespace(weight=weight)))
    latents = F.conv2d(values["e2e_enc_hidden"], weight, padding=1)
    decoded = F.interpolate(F.conv2d(latents, values["e2e_dec_weight"]), size=(8, 8), mode="nearest")
    loss = (values["inputs"] - decoded).abs().sum() / 2
    projected = F.conv2d(latents, values["proj_weight"])
    alignment = marginal_cosine_loss(projected, values["features"]) + distance_matrix_loss(
        projected, values["features"]
    )
    torch.testing.assert_close(alignment, values["e2e_vf_loss"].to(alignment))
    objective = SimpleNamespace(model=model, alignment_weight=0.1)
    found = VAEObjective.weigh_alignment(objective, loss, alignment)
    torch.testing.assert_close(found, values["e2e_vf_weight"].to(found), rtol=1e-4, atol=0)
    total = loss + 4e-6 + found * alignment
    torch.testing.assert_close(total, values["e2e_total"].to(total))
    total.backward()
    torch.testing.assert_close(weight.grad, values["e2e_grad_conv_out"], rtol=1e-4, atol=1e-4)


def test_without_quant_convolutions():
    vae = tiny_kl(use_quant_conv=False, use_post_quant_conv=False)
    assert isinstance(vae.encoder, nn.Module) and vae.quant_conv is None
    VAEObjective(vae)(batch(), numbers())["loss"].backward()


def test_bad_weights():
    with pytest.raises(ValueError, match="kl_weight must be finite and not negative, got -1"):
        VAEObjective(tiny_kl(), kl_weight=-1.0)
    with pytest.raises(ValueError, match="alignment_weight must be finite and not negative, got -0.5"):
        VAEObjective(tiny_kl(), alignment_weight=-0.5)
