"""MeanFlow: average velocities, with which one step leads from noise to data (arXiv 2505.13447).

u(x_t, r, t) = 1 / (t - r) int_r^t v dtau,  and so  u = v - (t - r) du/dt  with  du/dt = v d_x u + d_t u  (MeanFlow,
equation 6): the right-hand side, with the gradient stopped, is what u is trained for.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..generators.prediction import to_velocity
from ..utils.randomness import ImageRandom
from .base import Mean, check_not_negative
from .flow_matching import check_timestep_sampling, shift_time
from .generator import GeneratorObjective


__all__ = ["MeanFlowObjective", "TimePairs", "adaptive_loss", "guided_velocity"]


@dataclass(frozen=True)
class TimePairs:
    """The distribution of the times r <= t: two numbers in order, equal for a share of the images.

    Args:
        mean, std: of the normal numbers (MeanFlow on ImageNet: -0.4 and 1; on CIFAR-10: -2 and 2).
        instant_share: share of images with r = t (ImageNet: 0.75; CIFAR-10: 0.25).
        shift: s <= 1 of `shift_time`, for both times.
        mean_r: another mean for r, which is then lowered to t where it is above (MeanFlow's later CIFAR-10 runs: -4,
            with mean -0.6 and std 1.6); None sorts both.
        timestep_sampling: `"logit_normal"`, the sigmoid of normal numbers, or `"uniform"` (MF-RAE).

    Raises:
        ValueError: numbers out of range.
    """

    mean: float = -0.4
    std: float = 1.0
    instant_share: float = 0.75
    shift: float = 1.0
    mean_r: float | None = None
    timestep_sampling: Literal["uniform", "logit_normal"] = "logit_normal"

    def __post_init__(self):
        if not 0 <= self.instant_share <= 1:
            raise ValueError(f"instant_share must be from 0 to 1, got {self.instant_share}")
        if not 0 < self.shift <= 1:
            raise ValueError(f"shift must be in (0, 1], the papers' s and not diffusers' 1 / s, got {self.shift}")
        check_not_negative(std=self.std)
        check_timestep_sampling(self.timestep_sampling)

    def sample(self, count: int, random: ImageRandom) -> tuple[torch.Tensor, torch.Tensor]:
        """t and r, both (count,) in [0, 1]."""
        is_instant = random.uniform(count) < self.instant_share
        if self.timestep_sampling == "uniform":
            t, r = random.uniform(count, 2).unbind(1)
        else:
            first, second = random.normal(count, 2).unbind(1)
            t = (self.mean + self.std * first).sigmoid()
            r = ((self.mean if self.mean_r is None else self.mean_r) + self.std * second).sigmoid()
        if self.mean_r is None:
            t, r = torch.maximum(t, r), torch.minimum(t, r)
        t, r = shift_time(t, self.shift), shift_time(r, self.shift)
        return t, torch.where(is_instant, t, torch.minimum(r, t))


def guided_velocity(
    velocity: torch.Tensor,
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    t: torch.Tensor,
    omega: float,
    kappa: float | torch.Tensor,
    interval: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    """omega v + (1 - omega - kappa) v_uncond + kappa v_cond, for t in a closed interval, else v (MeanFlow, 4.2).

    Where v_cond has become this guided velocity, it is that of classifier-free guidance with a scale of
    omega / (1 - kappa). Improved MeanFlow has omega = 1, kappa = 1 - 1 / scale.

    Args:
        velocity, conditional, unconditional: eps - x, and the model's velocities at x_t; all (B, C, H, W).
        t: noise times (B,).
    """
    guided = omega * velocity + (1 - omega - kappa) * unconditional + kappa * conditional
    is_inside = (t >= interval[0]) & (t <= interval[1])
    return torch.where(is_inside.view(-1, 1, 1, 1), guided, velocity)


def adaptive_loss(
    prediction: torch.Tensor, target: torch.Tensor, power: float = 1.0, constant: float = 1e-2
) -> tuple[torch.Tensor, torch.Tensor]:
    """S / (S + c)^p with the gradient of the denominator stopped, and S, the sum of squared errors; per image (B,).

    With p = 1 the loss is always close to 1: follow S.
    """
    errors = (prediction - target).square().mean(dim=(1, 2, 3)) * prediction[0].numel()
    return errors / (errors.detach() + constant) ** power, errors.detach()


class MeanFlowObjective(GeneratorObjective):
    """The error of average velocities u(x_t, r, t), for a model with `use_meanflow`.

    Logged are the mean squared error of all images, of those with r = t, where it is that of flow matching, and of
    those with r < t, and for these the mean square of du/dt: the loss itself says little with `adaptive_power` 1.

    Args:
        model: `model(x_t, 1000 t, timestep_r=1000 r, **condition) -> .sample`.
        vae, label_dropout, condition: as in `GeneratorObjective`. Dropped images have the unguided velocity as target.
        times: the distribution of r and t.
        improved: take du/dt along the model's own velocity u(x_t, t, t) instead of eps - x, which a model cannot know
            (improved MeanFlow, arXiv 2512.02012, with the boundary form of the velocity).
        teacher: a frozen model of velocities in place of eps - x, in the target and in du/dt (MF-RAE's distillation).
        adaptive_power, adaptive_constant: p and c of `adaptive_loss` (ImageNet: 1 and 0.01).
        omega, kappa, guidance_interval: guidance in the target, see `guided_velocity`; the model's one evaluation is
            then guided. By default there is none.

    Raises:
        ValueError: a model without `use_meanflow`, numbers out of range, or both a teacher and `improved`.
    """

    def __init__(
        self,
        model: nn.Module,
        vae: nn.Module,
        label_dropout: float = 0.1,
        condition: nn.Module | None = None,
        times: TimePairs = TimePairs(),
        improved: bool = False,
        teacher: nn.Module | None = None,
        adaptive_power: float = 1.0,
        adaptive_constant: float = 1e-2,
        omega: float = 1.0,
        kappa: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ):
        if not model.config.use_meanflow:
            raise ValueError("model must have use_meanflow, see enable_meanflow(), got False")
        check_not_negative(
            adaptive_power=adaptive_power, adaptive_constant=adaptive_constant, omega=omega, kappa=kappa
        )
        if kappa >= 1:
            raise ValueError(f"kappa must be below 1, got {kappa}")
        if not 0 <= guidance_interval[0] < guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval must be rising within [0, 1], got {guidance_interval}")
        if teacher is not None and improved:
            raise ValueError("improved must be False with a teacher, along whose velocity du/dt is taken, got True")
        super().__init__(model, vae, label_dropout, condition)
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self.times, self.improved = times, improved
        self.adaptive_power, self.adaptive_constant = adaptive_power, adaptive_constant
        self.omega, self.kappa, self.guidance_interval = omega, kappa, guidance_interval

    def forward(self, batch: dict[str, torch.Tensor], random: ImageRandom) -> dict[str, torch.Tensor | Mean]:
        latents = self.latents(batch, random)
        t, r = self.times.sample(len(latents), random)
        noise = random.normal(*latents.shape)
        dropped = random.uniform(len(latents)) < (self.label_dropout if self.training else 0.0)
        condition = self.condition(batch, dropped)
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        velocity = self.velocity(latents, noise, noisy, t, condition)
        if (self.omega, self.kappa) != (1, 0):
            others = self.condition(batch), self.condition(batch, torch.ones_like(dropped))
            guided = self.guide(velocity, noisy, t, *others)
            velocity = torch.where(dropped.view(-1, 1, 1, 1), velocity, guided)
        target, derivative = self.target(velocity, noisy, t, r, condition)
        losses, errors = adaptive_loss(
            self.average(noisy, t, r, condition), target, self.adaptive_power, self.adaptive_constant
        )
        numbers, is_moving = latents[0].numel(), r < t
        squares = derivative.square().flatten(1).mean(dim=1)
        return {
            "loss": losses.mean(),
            "mse": errors.mean() / numbers,
            "mse_instant": _mean_of(errors / numbers, ~is_moving),
            "mse_interval": _mean_of(errors / numbers, is_moving),
            "derivative_square": _mean_of(squares, is_moving),
        }

    def average(
        self, noisy: torch.Tensor, t: torch.Tensor, r: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The model's average velocity from r to t at x_t, in fp32; with r = t its velocity."""
        prediction = self.model(noisy, 1000 * t, timestep_r=1000 * r, **condition).sample.float()
        return to_velocity(self.model.config.prediction_type, prediction, noisy, t)

    @torch.no_grad()
    def velocity(self, latents, noise, noisy, t, condition) -> torch.Tensor:
        """The velocity to be averaged: eps - x, or that of the teacher."""
        if self.teacher is not None:
            prediction = self.teacher(noisy, 1000 * t, **condition).sample.float()
            return to_velocity(self.teacher.config.prediction_type, prediction, noisy, t)
        if self.model.config.prediction_type == "velocity":
            return noise - latents
        return to_velocity("sample", latents, noisy, t)  # with the clamp of small times that the model's has

    @torch.no_grad()
    def guide(self, velocity, noisy, t, condition, null_condition) -> torch.Tensor:
        """`guided_velocity` by the model's own velocities for a condition and for none."""
        conditional, unconditional = (self.average(noisy, t, t, each) for each in (condition, null_condition))
        guidance = self.omega, self.kappa, self.guidance_interval
        return guided_velocity(velocity, conditional, unconditional, t, *guidance)

    @torch.no_grad()
    def target(self, velocity, noisy, t, r, condition) -> tuple[torch.Tensor, torch.Tensor]:
        """v - (t - r) du/dt and du/dt, which is 0 where r = t: the host waits for the device to leave these out."""
        tangent = self.average(noisy, t, t, condition) if self.improved else velocity
        derivative = torch.zeros_like(noisy)
        moving = (r < t).nonzero().squeeze(1)
        if len(moving):
            condition = {name: value[moving] for name, value in condition.items()}
            derivative[moving] = self.derivative(noisy[moving], t[moving], r[moving], tangent[moving], condition)
        return velocity - (t - r).view(-1, 1, 1, 1) * derivative, derivative

    @torch.compiler.disable
    def derivative(self, noisy, t, r, tangent, condition) -> torch.Tensor:
        """du/dt at x_t along a velocity, with r fixed: a Jacobian-vector product with (v, 1), in fp32."""

        def average(noisy, t):
            return self.average(noisy, t, r, condition)

        # Other kernels of attention have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(noisy.device.type, enabled=False):
            return torch.func.jvp(average, (noisy, t), (tangent, torch.ones_like(t)))[1]


def _mean_of(values, chosen):
    return Mean((values * chosen).sum(), chosen.sum())
