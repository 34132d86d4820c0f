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
        self.init_noise_sigma = 1.0
        self._begin_index = None
        self.num_inference_steps = None
        grid = torch.linspace(1.0, 1 / num_train_timesteps, num_train_timesteps, dtype=torch.float64)
        self._set_grid(grid, device=None)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """Number of steps taken; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later step of the grid, as image-to-image does. By default the first timestep decides."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: torch.Tensor | float) -> int:
        """Index of a timestep of the grid.

        Raises:
            ValueError: it is not on the grid.
        """
        indices = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps)).nonzero()
        if len(indices) == 0:
            raise ValueError(f"timestep must be one of scheduler.timesteps, got {float(timestep):g}")
        return indices[0].item()

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
        self.num_inference_steps = len(grid)
        self._begin_index = None
        self._set_grid(grid, device)

    def _set_grid(self, grid, device):
        grid = self.config.shift * grid / (1 + (self.config.shift - 1) * grid)
        self.timesteps = (grid * self.config.num_train_timesteps).to(device=device, dtype=torch.float32)
        self.sigmas = torch.cat([grid, grid.new_zeros(1)])
        self._step_index = None

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """The model input is the sample itself."""
        return sample

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The noisy sample x_t = (1 - t) x + t eps.

        Args:
            sample, noise: x and eps (B, C, H, W); noise is drawn if None.
            timestep: one of `timesteps`, or one per sample (B,).

        Raises:
            ValueError: a timestep that is not on the grid.
        """
        timesteps = torch.as_tensor(timestep).reshape(-1)
        sigmas = self.sigmas[[self.index_for_timestep(each) for each in timesteps]].to(sample)
        sigmas = sigmas.view(-1, *[1] * (sample.ndim - 1))
        noise = torch.randn_like(sample) if noise is None else noise
        return (1 - sigmas) * sample + sigmas * noise

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`scale_noise`, in the order of arguments of diffusers' schedulers for noise prediction."""
        return self.scale_noise(original_samples, timesteps, noise)

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
            timestep: the current entry of `timesteps`. The first one decides where on the grid the steps begin.
            sample: x_t (B, C, H, W).
            generator: of the noise; a list has one per sample.

        Raises:
            ValueError: a timestep that is not on the grid, or no steps are left.
        """
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        if self._step_index >= len(self.timesteps):
            raise ValueError(f"step must be called {len(self.timesteps)} times at most, got timestep {timestep}")
        t, t_next = self.sigmas[self._step_index : self._step_index + 2].tolist()
        self._step_index += 1
        velocity, x = model_output.float(), sample.float()
        drift = velocity + (x + (1 - t) * velocity)
        prev_sample = x - (t - t_next) * drift
        if t_next > 0:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            prev_sample = prev_sample + (2 * t * (t - t_next)) ** 0.5 * noise
        prev_sample = prev_sample.to(sample.dtype)
        return FlowMatchEulerMaruyamaSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
