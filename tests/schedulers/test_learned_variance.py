import math

import pytest
import torch
from diffusers import DDPMScheduler

from hf_fae.generators.diffusion_head import head_scheduler
from hf_fae.schedulers.learned_variance import (
    add_noise,
    check_scheduler,
    hybrid_loss,
    learned_variance_scheduler,
    previous_gaussian,
    reverse_steps,
)


SCHEDULERS = {"cosine": head_scheduler, "linear": lambda: learned_variance_scheduler("linear")}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("num_steps", [7, 100, 1000])
def test_a_step_back_is_that_of_diffusers(schedule, num_steps):
    scheduler = SCHEDULERS[schedule]()
    steps = reverse_steps(scheduler, num_steps, "cpu")
    assert len(steps) == num_steps and steps[0][0] == 999 and steps[-1][0] == 0 and steps[-1][2] == 1
    noisy, noise, variance = torch.randn(3, 5, 4)
    for time, alphas_cumprod, previous in (steps[0], steps[num_steps // 2], steps[-2], steps[-1]):
        expected = scheduler.step(
            torch.cat([noise, variance], dim=1), time, noisy, generator=torch.Generator().manual_seed(1)
        ).prev_sample
        mean, log_variance = previous_gaussian(noise, variance, noisy, alphas_cumprod, previous)
        fresh = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
        found = mean + (0.5 * log_variance).exp() * fresh if time > 0 else mean
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_hundred_steps_are_spaced_as_in_the_papers_code():
    """Its stride is 999 / 99, each time rounded to a whole number."""
    times = [time for time, *_ in reverse_steps(head_scheduler(), 100, "cpu")]
    assert times[::-1] == [round(index * 999 / 99) for index in range(100)]


@pytest.mark.parametrize(("spacing", "low", "high"), [("linspace", 250, 350), ("leading", 1.3, 2.5)])
def test_what_the_first_step_makes_of_an_error(spacing, low, high):
    """As the docstring of `learned_variance_scheduler` has it."""
    scheduler = learned_variance_scheduler("squaredcos_cap_v2", spacing)
    time, alphas_cumprod, previous = reverse_steps(scheduler, 100, "cpu")[0]
    right, wrong = (
        previous_gaussian(torch.tensor(error), torch.tensor(0.0), torch.tensor(1.0), alphas_cumprod, previous)[0]
        for error in (0.0, 1.0)
    )
    assert low < (right - wrong).item() < high


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_noise_is_added_as_by_diffusers(schedule):
    scheduler, (clean, noise) = SCHEDULERS[schedule](), torch.randn(2, 4, 3)
    timestep = torch.tensor([0, 10, 500, 999])
    found = add_noise(clean, noise, scheduler.alphas_cumprod[timestep][:, None])
    torch.testing.assert_close(found, scheduler.add_noise(clean, noise, timestep))


class TestHybridLoss:
    def losses(self, noise_error, variance, timestep, schedule="cosine"):
        table = SCHEDULERS[schedule]().alphas_cumprod
        clean, noise = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0)).double()
        predicted = (noise + noise_error).requires_grad_()
        variance = torch.full_like(noise, variance).requires_grad_()
        timestep = torch.full((2000,), timestep)
        losses = hybrid_loss(predicted, variance, clean, noise, timestep, table.double())
        return losses, predicted, variance

    @pytest.mark.parametrize("timestep", [1, 10, 500, 999])
    def test_bound_is_zero_for_the_true_step(self, timestep):
        (error, bound), *_ = self.losses(0.0, -1.0, timestep)
        assert not error.any()
        torch.testing.assert_close(bound, torch.zeros_like(bound), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("timestep", [10, 500])
    def test_bound_is_the_divergence_of_two_gaussians(self, timestep):
        """KL(N(m, s) || N(m', s')) by torch, in bits."""
        (error, bound), *_ = self.losses(0.3, 0.5, timestep)
        table = head_scheduler().alphas_cumprod.double()
        current, previous = table[timestep], table[timestep - 1]
        beta = 1 - current / previous
        smallest = beta * (1 - previous) / (1 - current)
        # The mean moves by the error of x, which is -sqrt((1 - a) / a) of that of the noise.
        shift = previous.sqrt() * beta / (1 - current) * ((1 - current) / current).sqrt() * 0.3
        log_variance = 0.25 * smallest.log() + 0.75 * beta.log()
        true, model = (
            torch.distributions.Normal(mean, (0.5 * value).exp())
            for mean, value in ((0.0, smallest.log()), (shift, log_variance))
        )
        expected = torch.distributions.kl_divergence(true, model) / math.log(2)
        torch.testing.assert_close(error, torch.full_like(error, 0.09))
        torch.testing.assert_close(bound, expected.expand_as(bound), rtol=1e-4, atol=1e-7)

    def test_the_last_step_is_a_density(self):
        (_, bound), *_ = self.losses(0.0, 1.0, 0)
        beta = 1 - head_scheduler().alphas_cumprod[0].double()
        expected = 0.5 * (2 * math.pi * beta).log() / math.log(2)  # its mean is x, its variance beta
        torch.testing.assert_close(bound, expected.expand_as(bound), rtol=1e-4, atol=1e-4)

    def test_the_bound_trains_the_variance_alone(self):
        (error, bound), predicted, variance = self.losses(0.3, 0.0, 500)
        gradient = torch.autograd.grad(bound.sum(), [predicted, variance], allow_unused=True)
        assert gradient[0] is None and gradient[1].ne(0).all()
        gradient = torch.autograd.grad(error.sum(), [predicted, variance], allow_unused=True)
        assert gradient[0].ne(0).all() and gradient[1] is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"variance_type": "fixed_small"}, "scheduler must have variance_type 'learned_range', got 'fixed_small'"),
        ({"prediction_type": "v_prediction"}, "scheduler must have prediction_type 'epsilon', got 'v_prediction'"),
        ({"clip_sample": True}, "scheduler must have clip_sample False, got True"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        check_scheduler(DDPMScheduler(**{**learned_variance_scheduler("linear").config, **setting}))


@pytest.mark.parametrize("num_steps", [1, 1001, 2.0])
def test_number_of_steps(num_steps):
    with pytest.raises(
        ValueError, match=f"num_diffusion_steps must be a whole number from 2 to 1000, got {num_steps}"
    ):
        reverse_steps(head_scheduler(), num_steps, "cpu")
