"""Schedulers are judged by what they do with the exact velocity."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from drawing import draw
from factories import tiny_fae_dit_pipeline

from hf_fae import FlowMatchEulerMaruyamaScheduler
from hf_fae.schedulers.path_check import check_path, check_shift


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
GOOD = {
    "euler": FlowMatchEulerDiscreteScheduler(shift=2.5),
    "stochastic euler": FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "heun": FlowMatchHeunDiscreteScheduler(shift=2.5),
    "sde": FlowMatchEulerMaruyamaScheduler(shift=6.0),
    "unipc": UniPCMultistepScheduler(**FLOW, flow_shift=2.5),
    "dpm": DPMSolverMultistepScheduler(**FLOW),
}
BAD = {
    "unipc without flow sigmas": (
        UniPCMultistepScheduler(prediction_type="flow_prediction"),
        "must follow the linear path .* got a UniPCMultistepScheduler that does not, which needs use_flow_sigmas=True",
    ),
    "unipc of noise": (UniPCMultistepScheduler(use_flow_sigmas=True), "must follow the linear path"),
    "ddim": (DDIMScheduler(), "must follow the linear path of flow matching, got a DDIMScheduler that does not"),
    "karras": (EulerDiscreteScheduler(), "must follow the linear path"),
    "inverted": (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "must follow the linear path"),
    "dynamic": (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "must run with a number of steps alone"),
}


def _state(scheduler):
    return {name: str(value) for name, value in vars(scheduler).items() if name != "_internal_dict"}


@pytest.mark.parametrize("scheduler", GOOD.values(), ids=GOOD)
def test_a_scheduler_on_the_path_passes_and_stays_as_it_was(scheduler):
    state = torch.random.get_rng_state()
    before = _state(scheduler)
    check_path(scheduler)
    assert _state(scheduler) == before and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("scheduler, message", BAD.values(), ids=BAD)
def test_a_scheduler_off_the_path_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        check_path(scheduler)


def test_a_scheduler_that_takes_the_place_of_another_keeps_its_shift():
    old = FlowMatchEulerDiscreteScheduler(shift=2.5)
    for scheduler in (UniPCMultistepScheduler.from_config(old.config, **FLOW), UniPCMultistepScheduler(**FLOW)):
        with pytest.raises(ValueError, match="must have the flow_shift 2.5 .* pass flow_shift=2.5, or another one"):
            check_shift(scheduler, 2.5)
    for shift in (2.5, 1.0):  # told explicitly
        check_shift(UniPCMultistepScheduler(**FLOW, flow_shift=shift), 2.5)


def test_a_pipeline_tries_a_scheduler_that_was_put_in_its_place():
    pipe = tiny_fae_dit_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=2.5))
    config = pipe.scheduler.config
    pipe.scheduler = UniPCMultistepScheduler.from_config(config, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="needs use_flow_sigmas=True"):
        draw(pipe, 1)
    pipe.scheduler = UniPCMultistepScheduler.from_config(config, **FLOW)
    with pytest.raises(ValueError, match="must have the flow_shift 2.5"):
        draw(pipe, 1)
    pipe.scheduler = UniPCMultistepScheduler.from_config(config, **FLOW, flow_shift=2.5)
    assert draw(pipe, 1).isfinite().all()
