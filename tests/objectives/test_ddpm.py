from types import SimpleNamespace

import pytest
import torch
from factories import tiny_dit, tiny_fae
from torch import nn

from hf_fae.generators.diffusion_head import head_scheduler
from hf_fae.objectives.ddpm import DiffusionObjective
from hf_fae.schedulers.learned_variance import learned_variance_scheduler
from hf_fae.utils.randomness import ImageRandom


class Oracle(nn.Module):
    """Knows the clean latents, so that it can name the noise, and sets the variance to one of its bounds."""

    def __init__(self, clean, table, variance):
        super().__init__()
        self.clean, self.table, self.variance = clean, table, variance
        self.config = SimpleNamespace(num_classes=10)

    def forward(self, noisy, timestep, class_labels):
        assert timestep.dtype == torch.int64 and timestep.min() >= 0 and timestep.max() <= 999
        self.timestep, self.labels = timestep, class_labels
        alphas = self.table[timestep][:, None, None, None]
        noise = (noisy - alphas.sqrt() * self.clean) / (1 - alphas).sqrt()
        return SimpleNamespace(sample=torch.cat([noise, torch.full_like(noise, self.variance)], dim=1))


@pytest.mark.parametrize("make_scheduler", [None, head_scheduler], ids=["linear", "cosine"])
def test_what_is_known_costs_nothing(make_scheduler):
    scheduler = make_scheduler() if make_scheduler else None
    table = (scheduler or learned_variance_scheduler("linear")).alphas_cumprod
    latents = torch.randn(4000, 2, 1, 1)
    model = Oracle(latents, table, -1.0)
    objective = DiffusionObjective(model, tiny_fae(), scheduler).eval()
    objective.latents = lambda batch, random: latents
    losses = objective({"class_labels": torch.full((4000,), 3)}, ImageRandom(0, 0))
    assert losses["noise_error"].item() == pytest.approx(0, abs=1e-4)
    # Only the density at time 0, one in a thousand, is not nearly zero.
    assert abs(losses["variational_bound"].item()) < 0.05
    assert model.timestep.float().mean().item() == pytest.approx(499.5, abs=20)
    assert model.labels.tolist() == [3] * 4000


def test_nothing_to_train_is_no_endless_loop():
    objective = DiffusionObjective(tiny_dit(), tiny_fae()).requires_grad_(False)
    assert objective.train().training and not objective.model.training and not objective.vae.training
    assert not objective.eval().training


def test_trains_the_denoiser():
    objective = DiffusionObjective(tiny_dit(), tiny_fae(), label_dropout=0.0).train()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs = {"pixel_values": images, "class_labels": torch.arange(4)}
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(25):
        loss = objective(inputs, ImageRandom(0, first_image=0))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in objective.model.parameters())
    assert losses[-1] < 0.8 * losses[0]


def test_base_head_has_a_loss_of_its_own():
    """The hybrid loss again, of the noise and the variance that the base head predicts."""
    model = tiny_dit(base_head_layer=1)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs = {"pixel_values": images, "class_labels": torch.arange(4)}
    plain, weighted = (
        DiffusionObjective(model, tiny_fae(), base_weight=weight).eval()(inputs, ImageRandom(0, 0))
        for weight in (0.0, 0.5)
    )
    torch.testing.assert_close(plain["loss"], plain["noise_error"] + plain["variational_bound"])
    torch.testing.assert_close(weighted["loss"], plain["loss"] + 0.5 * plain["base_loss"])
    assert plain["base_loss"] > 0 and plain["base_loss"] != plain["loss"]
