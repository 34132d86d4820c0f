import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hf_fae import FlowMatchEulerMaruyamaScheduler


def test_grid_of_250_steps():
    """250 uniform points from 1 to 0.04, then 0 (fae spec, section 1)."""
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(250)
    np.testing.assert_allclose(scheduler.sigmas, [*np.linspace(1, 0.04, 250), 0], atol=1e-12)
    np.testing.assert_allclose(scheduler.timesteps, 1000 * np.linspace(1, 0.04, 250), rtol=1e-6)


@pytest.mark.parametrize("t, shifted", [(0.1, 0.2174), (0.25, 0.4545), (0.5, 0.7143), (0.75, 0.8824), (0.9, 0.9574)])
def test_shift(t, shifted):
    """t' = t / (s + (1 - s) t) with s = 0.4, that is shift 2.5, applied once."""
    scheduler = FlowMatchEulerMaruyamaScheduler(shift=2.5)
    scheduler.set_timesteps(sigmas=[1.0, t])
    assert scheduler.sigmas[1] == pytest.approx(shifted, abs=5e-5)


def test_shifted_grid_keeps_its_last_step():
    scheduler = FlowMatchEulerMaruyamaScheduler(shift=2.5)
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-2] == pytest.approx(0.04) and scheduler.sigmas[-1] == 0
    assert (np.diff(scheduler.sigmas) < 0).all()


def sample(scheduler, mean, std, count=20000, steps=250, **grid):
    """Sample from N(mean, std^2) with the exact velocity of that Gaussian."""
    scheduler.set_timesteps(**grid or {"num_inference_steps": steps})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, generator=generator)
    for timestep in scheduler.timesteps:
        t = timestep / 1000
        variance = (1 - t) ** 2 * std**2 + t**2
        residual = (x - (1 - t) * mean) / variance
        # E[eps | x_t] - E[x | x_t]
        velocity = t * residual - (mean + (1 - t) * std**2 * residual)
        x = scheduler.step(velocity, timestep, x, generator=generator, return_dict=False)[0]
    return x


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_recovers_a_gaussian(shift):
    x = sample(FlowMatchEulerMaruyamaScheduler(shift=shift), mean=0.7, std=0.5)
    assert x.mean().item() == pytest.approx(0.7, abs=0.015) and x.std().item() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_ode_sampler_of_diffusers_recovers_it_too(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    x = sample(scheduler, mean=0.7, std=0.5, sigmas=np.linspace(1, 1 / 250, 250))
    assert x.mean().item() == pytest.approx(0.7, abs=0.015) and x.std().item() == pytest.approx(0.5, abs=0.015)


def test_single_step_closed_form():
    """x - h (v + x + (1 - t) v) + sqrt(2 t h) noise; the last step without noise."""
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(sigmas=[0.8, 0.5])
    x, v = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    expected = x - 0.3 * (v + x + 0.2 * v) + (2 * 0.8 * 0.3) ** 0.5 * noise
    step = scheduler.step(v, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(step.prev_sample, expected)
    last = scheduler.step(v, scheduler.timesteps[1], x).prev_sample
    torch.testing.assert_close(last, x - 0.5 * (v + x + 0.5 * v))


def test_exact_velocity_lands_on_the_data():
    """x_t + (1 - t) v = eps and x_t - t v = x for v = eps - x; a noise-free step of size t gives x - t eps."""
    x, eps, t = torch.randn(8), torch.randn(8), 0.3
    x_t, v = (1 - t) * x + t * eps, eps - x
    torch.testing.assert_close(x_t + (1 - t) * v, eps)
    torch.testing.assert_close(x_t - t * v, x)


def test_generators_are_per_sample():
    scheduler = FlowMatchEulerMaruyamaScheduler()
    x = torch.randn(2, 3, 4, 4)
    scheduler.set_timesteps(4)
    both = scheduler.step(x, 1000.0, x, generator=[torch.Generator().manual_seed(s) for s in (1, 2)]).prev_sample
    scheduler.set_timesteps(4)
    second = scheduler.step(x[1:], 1000.0, x[1:], generator=torch.Generator().manual_seed(2)).prev_sample
    assert torch.equal(both[1:], second)


def test_save_and_load(tmp_path):
    FlowMatchEulerMaruyamaScheduler(shift=2.5, last_sigma=0.02).save_pretrained(tmp_path)
    assert FlowMatchEulerMaruyamaScheduler.from_pretrained(tmp_path).config.shift == 2.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be positive, got 0"),
        ({}, "num_inference_steps must be positive, got None"),
        ({"sigmas": [0.5, 0.8]}, r"sigmas must fall strictly within \(0, 1\], got \[0.5, 0.8\]"),
        ({"sigmas": [1.5, 0.8]}, "sigmas must fall"),
        ({"sigmas": [1.0, 0.0]}, "sigmas must fall"),
        ({"sigmas": []}, "sigmas must fall"),
    ],
)
def test_bad_grids(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchEulerMaruyamaScheduler().set_timesteps(**arguments)


def test_step_past_the_end_of_the_grid():
    scheduler, x = FlowMatchEulerMaruyamaScheduler(), torch.zeros(1, 1, 1, 1)
    scheduler.set_timesteps(1)
    scheduler.step(x, 1000.0, x)
    with pytest.raises(ValueError, match="step must be called 1 times at most, got timestep 1000.0"):
        scheduler.step(x, 1000.0, x)


def test_step_begins_where_its_first_timestep_lies():
    """`timesteps[k:]` is integrated with the sigmas of its own, as diffusers' image-to-image pipelines expect."""
    scheduler, flow = FlowMatchEulerMaruyamaScheduler(), FlowMatchEulerDiscreteScheduler()
    x, v = torch.randn(2, 3, 4, 4)[:, None], torch.randn(2, 1, 3, 4, 4)[:, 0, None]
    for begin in (None, 6):
        scheduler.set_timesteps(10)
        if begin is not None:
            scheduler.set_begin_index(begin)
        assert scheduler.step_index is None and scheduler.begin_index == begin
        generator = torch.Generator().manual_seed(1)
        found = scheduler.step(v, scheduler.timesteps[6], x, generator=generator).prev_sample
        t, t_next = scheduler.sigmas[6:8].tolist()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        expected = x - (t - t_next) * (v + x + (1 - t) * v) + (2 * t * (t - t_next)) ** 0.5 * noise
        torch.testing.assert_close(found, expected)
        assert scheduler.step_index == 7
    assert len(scheduler) == len(flow) == 1000


def test_noise_of_a_timestep_equals_that_of_diffusers():
    scheduler, flow = FlowMatchEulerMaruyamaScheduler(shift=2.5), FlowMatchEulerDiscreteScheduler(shift=2.5)
    scheduler.set_timesteps(10)
    flow.set_timesteps(sigmas=scheduler.sigmas[:-1].numpy() / (2.5 - 1.5 * scheduler.sigmas[:-1].numpy()))
    x, noise = torch.randn(2, 2, 3, 4, 4)
    for timesteps in (scheduler.timesteps[3:4], scheduler.timesteps[[2, 7]]):
        found = scheduler.scale_noise(x, timesteps, noise)
        indices = [3] if len(timesteps) == 1 else [2, 7]
        torch.testing.assert_close(found, flow.scale_noise(x, flow.timesteps[indices], noise))
        assert torch.equal(found, scheduler.add_noise(x, noise, timesteps))
    with pytest.raises(ValueError, match="timestep must be one of scheduler.timesteps, got 123"):
        scheduler.index_for_timestep(123)
