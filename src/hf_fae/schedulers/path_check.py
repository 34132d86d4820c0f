"""Whether a scheduler samples the linear path of flow matching: found out by sampling, not by what its config says.

diffusers has schedulers that accept `prediction_type="flow_prediction"` and still work on another noise schedule,
without `use_flow_sigmas` for one: their samples are garbage.
"""

import functools
import inspect
import json

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin


__all__ = ["check_path", "check_shift", "set_flow_timesteps"]

DATA, NUM_STEPS, TOLERANCE = 3.0, 100, 0.15


def set_flow_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, final_sigma: float = 0.0, device: torch.device | None = None
) -> None:
    """Set the grid of a scheduler, uniform in sigma before its shift, from 1 to `final_sigma` and from there to 0."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # Left to itself this scheduler shifts twice (diffusers#13243).
        sigmas = np.linspace(1.0, final_sigma, num_inference_steps + 1)
        scheduler.set_timesteps(sigmas=sigmas if final_sigma else sigmas[:-1], device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)


def check_path(scheduler: SchedulerMixin) -> None:
    """Check that a scheduler, given the exact velocity, stays on the path x_t = (1 - t) x + t eps and ends at x.

    Costs 100 steps with 256 numbers, once for each class and config. Global random numbers stay as they are.

    Raises:
        ValueError: it does not, or it cannot be run with a number of steps alone.
    """
    _check_path(type(scheduler), scheduler.to_json_string())


@functools.cache
def _check_path(scheduler_class, config):
    name, scheduler = scheduler_class.__name__, scheduler_class.from_config(json.loads(config))
    generator = torch.Generator().manual_seed(0)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    kwargs = {"generator": generator} if takes_generator else {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        noise = torch.randn(1, 1, 16, 16, generator=generator)
        sample = noise = (noise - noise.mean()) / noise.std()
        try:
            set_flow_timesteps(scheduler, NUM_STEPS)
            times = (scheduler.timesteps.double() / scheduler.config.num_train_timesteps).tolist()
            for step, timestep in enumerate(scheduler.timesteps):
                velocity = (sample - DATA) / times[step]  # all data at one point
                sample = scheduler.step(velocity, timestep, sample, return_dict=False, **kwargs)[0].float()
                t = times[step + 1] if step + 1 < len(times) else 0.0
                error = max(abs(sample.mean().item() - (1 - t) * DATA), abs(sample.std().item() - t))
                if not error < TOLERANCE:
                    break
        except Exception as cause:  # each scheduler has its own ways to refuse its settings
            raise ValueError(f"scheduler must run with a number of steps alone, got a {name}: {cause}") from cause
    if not error < TOLERANCE:
        hint = ", which needs use_flow_sigmas=True" if scheduler.config.get("use_flow_sigmas") is False else ""
        raise ValueError(f"scheduler must follow the linear path of flow matching, got a {name} that does not{hint}")


def check_shift(scheduler: SchedulerMixin, shift: float) -> None:
    """Check that a scheduler that takes the place of another one has its time shift, unless it was told one.

    Schedulers of diffusers call it `shift` or `flow_shift`, and `from_config` does not carry one over to the other.

    Raises:
        ValueError: the shift was left at another default.
    """
    parameters, config = inspect.signature(type(scheduler).__init__).parameters, scheduler.config
    name = next((name for name in ("flow_shift", "shift") if name in parameters), None)
    shift = config.get("shift", shift) if name == "flow_shift" else config.get("flow_shift", shift)
    if name is not None and name in config.get("_use_default_values", []) and config[name] != shift:
        raise ValueError(
            f"scheduler must have the {name} {shift:g} that the transformer was trained with, got a "
            f"{type(scheduler).__name__} left at {config[name]:g}: pass {name}={shift:g}, or another one explicitly"
        )
