import math

import pytest
import torch
from factories import (
    tiny_detok,
    tiny_drorae,
    tiny_fae,
    tiny_lightning_dit,
    tiny_maetok,
    tiny_raev2_dit,
)
from objective_inputs import batch, numbers, trained
from torch import nn

from hf_fae.objectives.base import Mean, sample_posterior
from hf_fae.objectives.flow_matching import FlowMatchingObjective, dimension_shift, shift_time


class TestTimeShift:
    @pytest.mark.parametrize(
        ("t", "shift", "expected"),
        [(0.1, 0.4, 0.2174), (0.25, 0.4, 0.4545), (0.5, 0.4, 0.7143), (0.7, 0.4, 0.8537), (0.9, 0.4, 0.9574)]
        + [(0.5, 0.7, 0.5882), (0.5, 0.5, 0.6667), (0.5, 0.3, 0.7692), (0.5, 0.2, 0.8333), (0.3, 1.0, 0.3)]
        + [(0.1, 0.3, 0.2703), (0.25, 0.3, 0.5263), (0.75, 0.3, 0.9091), (0.9, 0.3, 0.9677)],  # l-DeTok's LightningDiT
    )
    def test_shift(self, t, shift, expected):  # fae and l-DeTok specs, section 1
        assert shift_time(torch.tensor(t), shift).item() == pytest.approx(expected, abs=5e-5)

    @pytest.mark.parametrize(
        ("shape", "t", "expected"),
        [((768, 16, 16), *pair) for pair in ((0.001, 0.006887), (0.1, 0.4350), (0.25, 0.6978), (0.5, 0.8739))]
        + [((768, 16, 16), 0.75, 0.9541), ((768, 16, 16), 0.9, 0.9842)]
        + [((768, 32, 32), 0.001, 0.013681), ((768, 32, 32), 0.5, 0.9327)],
    )
    def test_dimension_shift(self, shape, t, expected):  # rae_drorae spec, section 1
        assert shift_time(torch.tensor(t), dimension_shift(*shape)).item() == pytest.approx(expected, rel=1e-4)

    def test_dimension_shift_of_few_numbers_is_none(self):
        assert dimension_shift(4, 4, 4) == dimension_shift(16, 16, 16) == 1

    def test_shift_moves_towards_noise(self):
        t = (torch.arange(100_000) + 0.5) / 100_000
        assert shift_time(t, 0.4).mean().item() == pytest.approx(0.6486, abs=1e-4)

    def test_shift_is_that_of_the_scheduler(self):
        from diffusers import FlowMatchEulerDiscreteScheduler

        sigmas = torch.linspace(1, 0.1, 10)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / 0.4)
        scheduler.set_timesteps(sigmas=sigmas.tolist())
        torch.testing.assert_close(scheduler.sigmas[:-1], shift_time(sigmas, 0.4))


class Denoiser(nn.Module):
    """Records what it is called with; the answer is what a perfect model for `latents` would give."""

    def __init__(self, latents=None):
        super().__init__()
        self.config = type("Config", (), {"num_classes": 10})
        self.latents = latents

    def forward(self, hidden_states, timestep, class_labels):
        self.called_with = hidden_states, timestep, class_labels
        t = timestep.view(-1, 1, 1, 1) / 1000
        velocity = torch.zeros_like(hidden_states) if self.latents is None else (hidden_states - self.latents) / t
        return type("Output", (), {"sample": velocity})


class TestFlowMatchingObjective:
    def test_trains_the_denoiser(self):
        assert trained(FlowMatchingObjective(tiny_lightning_dit(), tiny_fae())) >= {"model.blocks", "model.proj_in"}

    def test_tokenizer_is_frozen(self):
        objective = FlowMatchingObjective(tiny_lightning_dit(), tiny_fae()).train()
        assert not any(p.requires_grad for p in objective.vae.parameters()) and not objective.vae.encoder.training

    def test_perfect_denoiser_has_no_loss(self):
        objective = FlowMatchingObjective(Denoiser(), tiny_fae())
        objective.model.latents = objective.latents(batch(), numbers())
        objective.latents = lambda batch, random: objective.model.latents
        assert objective(batch(), numbers())["loss"].item() < 1e-6

    def test_zero_denoiser_has_the_variance_of_the_target(self):
        objective = FlowMatchingObjective(Denoiser(), tiny_fae())
        latents = 3 * torch.ones(512, 4, 4, 4)
        objective.latents = lambda batch, random: latents
        loss = objective({"class_labels": torch.zeros(512, dtype=torch.long)}, numbers())["loss"]
        assert loss.item() == pytest.approx(9 + 1, rel=0.05)

    def test_path_and_times(self):
        objective = FlowMatchingObjective(Denoiser(), tiny_fae(), shift=0.4)
        latents = 100 * torch.ones(4000, 4, 1, 1)
        objective.latents = lambda batch, random: latents
        objective({"class_labels": torch.zeros(4000, dtype=torch.long)}, numbers())
        hidden_states, timestep, _ = objective.model.called_with
        t = timestep / 1000
        assert t.mean().item() == pytest.approx(0.6486, abs=0.02)
        # 100 (1 - t) + t eps
        assert ((hidden_states.mean((1, 2, 3)) / 100 - (1 - t)).abs() < 0.03).all()

    def test_velocity_leads_to_noise_and_data(self):
        """x_t + (1 - t) v = eps and x_t - t v = x (maetok spec, section 1)."""
        objective = FlowMatchingObjective(Denoiser(), tiny_fae())
        latents = objective.latents(batch(), numbers())
        objective.latents = lambda batch, random: latents
        objective.model.latents = latents
        objective(batch(), numbers(1))
        noisy, timestep, labels = objective.model.called_with
        t, velocity = timestep.view(-1, 1, 1, 1) / 1000, objective.model(*objective.model.called_with).sample
        numbers_again = numbers(1)
        numbers_again.uniform(len(latents))
        noise = numbers_again.normal(*latents.shape)
        torch.testing.assert_close(noisy + (1 - t) * velocity, noise, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(noisy - t * velocity, latents, atol=1e-4, rtol=1e-4)

    def test_logit_normal_times(self):
        """sigma / (1 + sigma) for sigma = exp(N(0, 1)): median 0.5, 68 % within the sigmoids of -1 and 1."""
        objective = FlowMatchingObjective(Denoiser(), tiny_fae(), timestep_sampling="logit_normal")
        times = objective.sample_timesteps(4000, numbers())
        assert times.median().item() == pytest.approx(0.5, abs=0.02)
        assert ((times > 0.2689) & (times < 0.7311)).float().mean().item() == pytest.approx(0.6827, abs=0.02)
        torch.testing.assert_close(times, numbers().normal(4000).exp() / (1 + numbers().normal(4000).exp()))
        objective = FlowMatchingObjective(Denoiser(), tiny_fae(), shift=0.3, timestep_sampling="logit_normal")
        torch.testing.assert_close(objective.sample_timesteps(4000, numbers()), shift_time(times, 0.3))

    def test_direction_of_the_velocity(self):
        """One minus the mean cosine over channels: 2 for the opposite direction, 0 for the right one of any length."""
        latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))

        def losses(factor, cosine_weight):
            objective = FlowMatchingObjective(Denoiser(latents), tiny_fae(), cosine_weight=cosine_weight)
            objective.latents = lambda batch, random: latents
            answer = objective.model.forward
            objective.model.forward = lambda *args, **kwargs: type(
                "Output", (), {"sample": factor * answer(*args, **kwargs).sample}
            )
            return objective(batch(), numbers())

        for factor, distance in ((-1.0, 2.0), (0.5, 0.0)):
            plain, both = losses(factor, 0.0), losses(factor, 0.5)
            assert "cosine_distance" not in plain
            assert both["cosine_distance"].item() == pytest.approx(distance, abs=1e-4)
            torch.testing.assert_close(both["loss"], plain["loss"] + 0.5 * both["cosine_distance"])

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"timestep_sampling": "normal"}, "timestep_sampling must be 'uniform' or 'logit_normal', got 'normal'"),
            ({"cosine_weight": -1.0}, "cosine_weight must be finite and not negative, got -1.0"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            FlowMatchingObjective(Denoiser(), tiny_fae(), **arguments)

    def test_latents_are_normalised_samples(self):
        vae, inputs = tiny_fae(), batch()
        objective = FlowMatchingObjective(tiny_lightning_dit(), vae)
        latents = objective.latents(inputs, numbers(2))
        posterior = vae.encode(inputs["pixel_values"]).latent_dist
        torch.testing.assert_close(latents, sample_posterior(posterior, numbers(2)))

    def test_cached_moments_give_the_latents_of_the_images(self):
        vae, inputs = tiny_fae(), batch()
        vae.set_latent_statistics(torch.zeros_like(vae.latents_mean), torch.ones_like(vae.latents_std))
        posterior = vae.encode(inputs["pixel_values"]).latent_dist
        cached = {"moments": torch.cat([posterior.mean, posterior.logvar], dim=1)}
        vae.set_latent_statistics(torch.full_like(vae.latents_mean, 0.5), torch.full_like(vae.latents_std, 2.0))
        objective = FlowMatchingObjective(tiny_lightning_dit(), vae)
        from_images = objective.latents(inputs, numbers())
        vae.image_encoder = None
        torch.testing.assert_close(objective.latents(cached, numbers()), from_images, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("make", [tiny_fae, tiny_drorae, tiny_detok, tiny_maetok])
    def test_latents_are_those_of_encode(self, make):
        """Though they are made without looking for NaN, for which the host would wait in every step."""
        vae, inputs = make(), batch()
        latents = FlowMatchingObjective(tiny_lightning_dit(), vae).latents(inputs, numbers())
        expected = sample_posterior(vae.encode(inputs["pixel_values"]).latent_dist, numbers())
        assert torch.equal(latents, expected.float())

    def test_loss_by_noise_time(self):
        objective = FlowMatchingObjective(Denoiser(), tiny_fae())
        objective.latents = lambda batch, random: 3 * torch.ones(5000, 4, 1, 1)
        losses = objective({"class_labels": torch.zeros(5000, dtype=torch.long)}, numbers())
        t = objective.model.called_with[1] / 1000
        means = {name: value for name, value in losses.items() if isinstance(value, Mean)}
        assert list(means) == [f"loss_t/0.{i}" for i in range(10)]
        for i, mean in enumerate(means.values()):
            assert mean.count == ((t >= i / 10) & (t < (i + 1) / 10)).sum()
        total, count = (sum(parts) for parts in zip(*means.values(), strict=True))
        assert count == 5000 and (total / count).item() == pytest.approx(losses["loss"].item())

    def test_label_dropout_while_training_only(self):
        objective = FlowMatchingObjective(Denoiser(), tiny_fae(), label_dropout=0.25)
        objective.latents = lambda batch, random: torch.zeros(8000, 4, 1, 1)
        inputs = {"class_labels": torch.full((8000,), 3)}
        for training, share in ((True, 0.25), (False, 0.0)):
            objective.training = training
            objective(inputs, numbers())
            labels = objective.model.called_with[2]
            assert set(labels.tolist()) == ({3, 10} if training else {3})
            assert (labels == 10).float().mean().item() == pytest.approx(share, abs=0.02)

    @pytest.mark.parametrize("shift", [0.0, 2.5])
    def test_shift_of_the_wrong_kind(self, shift):
        with pytest.raises(ValueError, match=f"shift must be in .*, got {shift}"):
            FlowMatchingObjective(tiny_lightning_dit(), tiny_fae(), shift=shift)


class TestCleanLatents:
    """Prediction of x with the loss of the velocity, and the loss of a base head (RAEv2)."""

    def make(self, answer, shift=1 / 8, **kwargs):
        """The objective of a denoiser that answers `answer(noisy, t)`; latents are 20,000 standard normal numbers."""
        objective = FlowMatchingObjective(
            tiny_lightning_dit(prediction_type="sample", **kwargs), tiny_fae(), shift, timestep_sampling="logit_normal"
        ).eval()
        latents = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
        objective.latents = lambda batch, random: latents
        objective.predictions = lambda noisy, timestep, **condition: answer(latents, noisy, timestep / 1000)
        objective.conditioning = lambda batch, random: {}
        return objective({}, numbers())

    def test_no_error_no_loss(self):
        losses = self.make(lambda x, noisy, t: [x, x])
        assert losses["loss"] == losses["base_loss"] == 0

    def test_loss_of_heads_that_give_0(self):
        """E[1 / t^2] = 1 + e^0.5 / 4 + e^2 / 64 at shift 8, for each head; the clamp changes it by less than 1e-3."""
        closed_form = 1 + math.exp(0.5) / 4 + math.exp(2) / 64
        assert closed_form == pytest.approx(1.527634, abs=1e-6)
        normal = torch.distributions.Normal(0.0, 1.0)
        quantiles = normal.icdf(torch.linspace(0, 1, 2_000_002, dtype=torch.float64)[1:-1])
        t = shift_time(quantiles.sigmoid(), 1 / 8)
        assert t.pow(-2).mean().item() == pytest.approx(closed_form, abs=1e-3)
        clamped = t.clamp_min(0.05).pow(-2).mean().item()
        assert clamped == pytest.approx(closed_form, abs=1e-3)
        losses = self.make(lambda x, noisy, t: [torch.zeros_like(x), torch.zeros_like(x)])
        assert losses["base_loss"].item() == pytest.approx(clamped, rel=0.05)
        torch.testing.assert_close(losses["loss"], 2 * losses["base_loss"])

    def test_error_of_x_is_weighted(self):
        """By 1 / max(t, 0.05)^2."""
        losses = self.make(lambda x, noisy, t: [x + 0.1 * t.clamp_min(0.05).view(-1, 1, 1, 1)], shift=1.0)
        assert losses["loss"].item() == pytest.approx(0.01, rel=1e-4) and "base_loss" not in losses

    @pytest.mark.parametrize("make", [tiny_lightning_dit, tiny_raev2_dit])
    @pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
    def test_weight_of_the_base_head(self, make, prediction_type):
        model, data = make(prediction_type=prediction_type, base_head_layer=1), batch()
        losses = {
            weight: FlowMatchingObjective(model, tiny_fae(), base_weight=weight)(data, numbers())
            for weight in (0.0, 0.5)
        }
        base = losses[0.0]["base_loss"]
        assert base > 0 and torch.equal(base, losses[0.5]["base_loss"])
        torch.testing.assert_close(losses[0.5]["loss"], losses[0.0]["loss"] + 0.5 * base)
        losses[0.5]["loss"].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        with pytest.raises(ValueError, match="base_weight must be finite and not negative, got -1"):
            FlowMatchingObjective(model, tiny_fae(), base_weight=-1)
