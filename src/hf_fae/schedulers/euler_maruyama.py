"""The SDE sampler of SiT and REPA for flow models, which diffusers lacks."""

import itertools
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


__all__ = ["FlowMatchEulerMaruyamaScheduler", "check_sigmas"]


def check_sigmas(sigmas: list[float]) -> None:
    """Check that sigmas lead from noise to data.

    Raises:
        ValueError: the sigmas are not strictly decreasing, or outside (0, 1].
    """
    path = [*map(float, sigmas), 0.0]
    if len(path) == 1 or path[0] > 1 or not all(high > low for high, low in itertools.pairwise(path)):
        raise ValueError(f"sigmas must fall strictly within (0, 1], got {list(sigmas)}")


@dataclass
class FlowMatchEulerMaruyamaSchedulerOutput(BaseOutput):
    """`prev_sample` (B, C, H, W): the input of the next step."""

    prev_sample: torch.Tensor


class FlowMatchEulerMaruyamaScheduler(SchedulerMixin, ConfigMixin):
    """Euler-Maruyama on the reverse SDE of the linear path, with g^2 = 2 t (FAE, appendix D; SiT; REPA).

    With v the velocity eps - x, the noise is eps = x_t + (1 - t) v, the score -eps / t, and the drift
    v - g^2 / 2 * score = v + eps. A step of size h adds sqrt(g^2 h) * noise, except for the last one, which leads from
    `last_sigma` to 0.

    Args:
        num_train_timesteps: the model's `timestep` at noise level 1; diffusers' 1000.
        shift: factor of SD3's time shift, 1 / s for the papers' s < 1; applied to the grid once.
        last_sigma: noise level (after the shift) at which the noise-free last step starts (REPA: 0.04).
    """

    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0, last_sigma: float = 0.04):
        self.sigmas = None
        self.timesteps = None
        self.init_noise_sigma = 1.0
        self._step_index = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """Set the grid: `num_inference_steps` sigmas from 1 to `last_sigma`, uniform before the shift, then 0.

        Args:
            num_inference_steps: number of model evaluations.
            device: of the grid.
            sigmas: custom decreasing sigmas in (0, 1] before the shift, instead of the uniform ones; 0 is appended.

        Raises:
            ValueError: neither a positive number of steps nor strictly decreasing sigmas in (0, 1].
        """
        shift = self.config.shift
        if sigmas is not None:
            check_sigmas(sigmas)
            grid = torch.as_tensor(sigmas, dtype=torch.float64)
        elif num_inference_steps is not None and num_inference_steps > 0:
            last = self.config.last_sigma
            last = last / (shift + (1 - shift) * last)  # the shift maps it back onto `last_sigma`
            grid = torch.linspace(1.0, last, num_inference_steps, dtype=torch.float64)
        else:
            raise ValueError(f"num_inference_steps must be positive, got {num_inference_steps}")
        grid = shift * grid / (1 + (shift - 1) * grid)
        self.num_inference_steps = len(grid)
        self.timesteps = (grid * self.config.num_train_timesteps).to(device=device, dtype=torch.float32)
        self.sigmas = [*grid.tolist(), 0.0]
        self._step_index = 0

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """The model input is the sample itself."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerMaruyamaSchedulerOutput | tuple:
        """One step towards the data, in fp32.

        Args:
            model_output: velocity eps - x (B, C, H, W).
            timestep: the current entry of `timesteps`; steps follow their order.
            sample: x_t (B, C, H, W).
            generator: of the noise; a list has one per sample.

        Raises:
            ValueError: `set_timesteps` was not called, or no steps are left.
        """
        if self._step_index is None or self._step_index >= len(self.timesteps):
            raise ValueError(
                f"step must be called once for each timestep after set_timesteps, got timestep {timestep}"
            )
        t, t_next = self.sigmas[self._step_index : self._step_index + 2]
        self._step_index += 1
        velocity, x = model_output.float(), sample.float()
        drift = velocity + (x + (1 - t) * velocity)
        prev_sample = x - (t - t_next) * drift
        if t_next > 0:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            prev_sample = prev_sample + (2 * t * (t - t_next)) ** 0.5 * noise
        prev_sample = prev_sample.to(sample.dtype)
        return FlowMatchEulerMaruyamaSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
