"""DDPM with a learned variance (arXiv 2102.09672): what diffusers' `DDPMScheduler` lacks, for tensors of times.

A network predicts the noise eps in x_t = sqrt(a_t) x + sqrt(1 - a_t) eps, with a_t = `alphas_cumprod`, and a value v
per element, which interpolates the log-variance of the reverse step between its two bounds. Betas, time steps and the
config are the scheduler's.
"""

import math

import torch
from diffusers import DDPMScheduler


__all__ = [
    "add_noise",
    "check_num_steps",
    "check_scheduler",
    "hybrid_loss",
    "learned_variance_scheduler",
    "previous_gaussian",
    "reverse_steps",
]


def learned_variance_scheduler(beta_schedule: str, timestep_spacing: str = "linspace") -> DDPMScheduler:
    """A `DDPMScheduler` with 1000 times, evenly re-spaced, a learned variance and no clipping.

    DiT uses linear betas, diffusion heads cosine ones.

    Args:
        beta_schedule: as in `DDPMScheduler`, `"linear"` or `"squaredcos_cap_v2"`.
        timestep_spacing: as there. With `"linspace"`, as in the papers' code, sampling starts at the last time, where
            cosine betas leave hardly any signal (a_t = 2e-9): the first of 100 steps amplifies an error of the noise
            316 times. `"leading"` starts one step earlier, where the factor is 1.6: for heads after short training.
    """
    return DDPMScheduler(
        beta_schedule=beta_schedule,
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing=timestep_spacing,
    )


def check_scheduler(scheduler: DDPMScheduler) -> None:
    """Check that a scheduler has the settings of this module.

    Raises:
        ValueError: a `variance_type`, `prediction_type` or clipping that would be ignored.
    """
    wanted = {"variance_type": "learned_range", "prediction_type": "epsilon", "clip_sample": False}
    for name, value in {**wanted, "thresholding": False}.items():
        if scheduler.config[name] != value:
            raise ValueError(f"scheduler must have {name} {value!r}, got {scheduler.config[name]!r}")


def check_num_steps(scheduler: DDPMScheduler, num_steps: int) -> None:
    """Check a number of sampling steps.

    Raises:
        ValueError: fewer than two, more than the scheduler has times, or not a whole number.
    """
    times = scheduler.config.num_train_timesteps
    if not isinstance(num_steps, int) or not 2 <= num_steps <= times:
        raise ValueError(f"num_diffusion_steps must be a whole number from 2 to {times}, got {num_steps!r}")


def add_noise(clean: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """x_t in fp32; `alphas_cumprod` is a_t of each element, in a broadcastable shape."""
    return alphas_cumprod.sqrt() * clean + (1 - alphas_cumprod).sqrt() * noise


def previous_gaussian(
    noise: torch.Tensor,
    variance: torch.Tensor,
    noisy: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    previous: torch.Tensor,
    min_variance: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the reverse step from x_t (equations 9 and 15 of the paper).

    Args:
        noise, variance: the network's predictions at x_t, eps and v; v = -1 is the lower bound, v = 1 the upper one.
        noisy: x_t.
        alphas_cumprod, previous: a_t, and a at the end of the step, 1 for data; both broadcastable.
        min_variance: minimum of the lower bound.
    """
    clean = (noisy - (1 - alphas_cumprod).sqrt() * noise) / alphas_cumprod.sqrt()
    mean, smallest = _posterior(clean, noisy, alphas_cumprod, previous)
    beta = 1 - alphas_cumprod / previous
    return mean, torch.lerp(smallest.clamp_min(min_variance).log(), beta.log(), (variance + 1) / 2)


def _posterior(clean, noisy, alphas_cumprod, previous):
    """Mean and variance of the reverse step given x (equations 10 and 11 of the paper)."""
    alpha = alphas_cumprod / previous
    beta, rest = 1 - alpha, 1 - alphas_cumprod
    mean = (previous.sqrt() * beta / rest) * clean + (alpha.sqrt() * (1 - previous) / rest) * noisy
    return mean, beta * (1 - previous) / rest


def reverse_steps(
    scheduler: DDPMScheduler, num_steps: int, device: torch.device
) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Time, a_t and a of the next time for each step from noise to data, with the scheduler's spacing.

    Raises:
        ValueError: as `check_num_steps`.
    """
    check_num_steps(scheduler, num_steps)
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.cpu()
    table = torch.cat([scheduler.alphas_cumprod.cpu()[timesteps], torch.ones(1)]).to(device)
    return list(zip(timesteps.tolist(), table[:-1], table[1:], strict=True))


def hybrid_loss(
    noise: torch.Tensor,
    variance: torch.Tensor,
    clean: torch.Tensor,
    true_noise: torch.Tensor,
    timestep: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of the loss per element: the squared error of eps, and the variational bound in bits.

    The bound trains the variance alone: its noise is detached (section 3.1 of the paper). Its term at time 0 is the
    negative log-density of x: latents are continuous, while the papers' code discretises into grey levels.

    Args:
        noise, variance: predictions at `add_noise(clean, true_noise, alphas_cumprod[timestep])`, fp32.
        clean, true_noise: of the same shape.
        timestep: long, in a broadcastable shape.
        alphas_cumprod: (T,), the scheduler's table on the device of the others.
    """
    current = alphas_cumprod[timestep]
    previous = torch.where(timestep > 0, alphas_cumprod[(timestep - 1).clamp_min(0)], 1.0)
    noisy = add_noise(clean, true_noise, current)
    # At time 0 the lower bound would be 0: that of time 1 replaces it, as in the paper's code.
    _, floor = _posterior(clean.new_zeros(()), clean.new_zeros(()), alphas_cumprod[1], alphas_cumprod[0])
    mean, log_variance = previous_gaussian(noise.detach(), variance, noisy, current, previous, min_variance=floor)
    true_mean, true_variance = _posterior(clean, noisy, current, previous)
    true_log_variance = true_variance.clamp_min(floor).log()
    error = (true_mean - mean).square() * (-log_variance).exp()
    divergence = 0.5 * (log_variance - true_log_variance + (true_log_variance - log_variance).exp() + error - 1)
    # At time 0 the mean of the reverse step given x is x itself.
    negative_log_density = 0.5 * (math.log(2 * math.pi) + log_variance + error)
    bound = torch.where(timestep > 0, divergence, negative_log_density) / math.log(2)
    return (noise - true_noise).square(), bound
