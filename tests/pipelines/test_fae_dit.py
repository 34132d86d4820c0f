"""What only pipelines with a denoiser have: steps, sigmas, guidance over time."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from drawing import SETTINGS, count_batches, draw
from factories import tiny_fae_dit_pipeline

from hf_fae import FlowMatchEulerMaruyamaScheduler


@pytest.fixture(params=[FlowMatchEulerDiscreteScheduler, FlowMatchEulerMaruyamaScheduler])
def pipe(request):
    return tiny_fae_dit_pipeline(**SETTINGS, scheduler=request.param(shift=2.5))


def test_no_unconditional_pass_without_guidance(pipe):
    batches = count_batches(pipe)
    plain = draw(pipe, guidance_scale=1.0)
    assert batches == [1] * 4 and not pipe.do_classifier_free_guidance
    batches.clear()
    guided = draw(pipe, guidance_scale=[(0.9, 1.0, 3.0)])
    # Shifted by 2.5, the second of four uniform steps is at t = 0.88 for the ODE and 0.85 for the SDE.
    assert batches == [2, 1, 1, 1]
    assert not torch.equal(plain, guided)


def test_scales_below_one_guide_and_zero_is_unconditional(pipe):
    null = torch.full((1,), pipe.transformer.config.num_classes)
    assert not torch.equal(draw(pipe, guidance_scale=0.9), draw(pipe, guidance_scale=1.0))
    original = pipe.transformer.forward
    unguided = draw(pipe, guidance_scale=0.0)
    pipe.transformer.forward = lambda x, t, labels, **kw: original(x, t, null.expand(len(x)), **kw)
    torch.testing.assert_close(draw(pipe, guidance_scale=1.0), unguided, atol=1e-5, rtol=1e-4)


def test_bounds_of_intervals_are_exact():
    """On the grid 1, 0.9, ..., 0.1 a bound of 0.3 or 0.7 includes the step at that very time."""
    pipe = tiny_fae_dit_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    batches = count_batches(pipe)
    draw(pipe, 0, num_inference_steps=10, guidance_scale=[(0.0, 0.3, 2.0), (0.6, 0.7, 2.0)])
    assert batches == [1, 1, 1, 2, 1, 1, 1, 2, 2, 2]


def test_own_sigmas(pipe):
    uniform = np.linspace(1, 0.25, 4)
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        assert torch.equal(draw(pipe, sigmas=uniform), draw(pipe))
    batches = count_batches(pipe)
    draw(pipe, sigmas=[1.0, 0.5], guidance_scale=1.0)
    assert batches == [1, 1]


def test_default_steps_come_from_the_checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, num_inference_steps=2)
    batches = count_batches(loaded)
    assert torch.equal(draw(loaded), draw(pipe, num_inference_steps=2))
    assert len(batches) == 2


def test_a_schedule_has_no_single_scale(pipe):
    draw(pipe, guidance_scale=[(0.0, 0.7, 2.5)])
    assert pipe.guidance_scale is None


def test_callback_gets_the_timestep(pipe):
    seen = []
    draw(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(float(timestep)))
    assert seen == pipe.scheduler.timesteps.tolist() and seen[0] == 1000
