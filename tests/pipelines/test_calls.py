"""Calls of one pipeline in several threads, each with its own state."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from drawing import SETTINGS, draw
from factories import tiny_fae_dit_pipeline, tiny_fae_mar_pipeline, tiny_fae_starflow_pipeline


MAKERS = {"dit": tiny_fae_dit_pipeline, "mar": tiny_fae_mar_pipeline, "flow": tiny_fae_starflow_pipeline}


@pytest.fixture(params=MAKERS)
def pipe(request):
    return MAKERS[request.param](**SETTINGS)


def test_threads_get_the_images_that_each_gets_alone(pipe):
    wanted = [{"seed": seed, "guidance_scale": scale} for seed in (1, 2) for scale in (1.0, 3.0)]
    alone = [draw(pipe, "dog", **options) for options in wanted]
    start = threading.Barrier(len(wanted))

    def meet(pipe, step, timestep, tensors):  # all calls are in the middle at the same time
        start.wait(timeout=60)
        return tensors

    def run(options):
        return draw(pipe, "dog", callback_on_step_end=meet, **options)

    with ThreadPoolExecutor(len(wanted)) as pool:
        together = list(pool.map(run, wanted))
    for image, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-4)


def test_interrupt_in_a_callback_stops_that_call_alone(pipe):
    steps = {"stopped": [], "other": []}
    start = threading.Barrier(2)

    def run(name):
        def note(pipe, step, timestep, tensors):
            if step == 0:
                start.wait(timeout=60)
            steps[name].append(step)
            pipe._interrupt = name == "stopped" and step == 1
            return tensors

        draw(pipe, callback_on_step_end=note)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, steps))
    assert steps == {"stopped": [0, 1], "other": [0, 1, 2, 3]}


def test_interrupt_on_the_pipeline_stops_running_calls(pipe):
    steps = []

    def stop(_, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True
        return tensors

    draw(pipe, callback_on_step_end=stop)
    assert steps == [0]
    draw(pipe, callback_on_step_end=lambda *args: steps.append("next") or {})
    assert steps == [0] + ["next"] * 4  # the next call starts anew


def test_a_call_leaves_the_scheduler_as_it_was():
    pipe = tiny_fae_dit_pipeline(**SETTINGS)
    before = pipe.scheduler.timesteps.tolist()
    draw(pipe)
    assert pipe.scheduler.timesteps.tolist() == before
    assert pipe.num_timesteps == 4  # of the latest call
    assert not pipe._running


def test_a_call_that_fails_is_not_running_any_more():
    pipe = tiny_fae_dit_pipeline(**SETTINGS)

    def fail(*args):
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        draw(pipe, callback_on_step_end=fail)
    assert not pipe._running


def test_a_callback_changes_the_guidance_of_its_call():
    """By diffusers' convention, where a scale of up to 1 is none; other calls keep theirs."""
    pipe = tiny_fae_dit_pipeline()
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(guidance_scale, **changes):
        def change(call, step, timestep, tensors):
            assert call._guidance_scale == call.guidance_scale
            if step in changes.get("at", {}):
                call._guidance_scale = changes["at"][step]
            return tensors

        options = {"latents": noise, "output_type": "latent", "num_inference_steps": 4}
        return pipe(1, guidance_scale=guidance_scale, callback_on_step_end=change, **options).images

    times = [0.0, *(pipe.scheduler.config.shift * t / (1 + (pipe.scheduler.config.shift - 1) * t) for t in (0.5, 1.0))]
    late = [(times[1], 1.0, 3.0)]
    torch.testing.assert_close(run(3.0, at={1: 0.0}), run(late), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(1.0, at={1: 3.0}), run([(0.0, times[1], 3.0)]), atol=1e-5, rtol=1e-4)
    assert pipe(1, latents=noise, output_type="latent").images.isfinite().all()
