"""The head that samples a continuous token, given the output of an autoregressive model (MAR, arXiv 2406.11838).

A small diffusion model is the distribution of a token: an MLP that sees no other tokens, conditioned on the vector
that the autoregressive model computes for this one ("diffusion loss", section 3 of the paper).
"""

import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.nn import functional as F

from ..guidance import TokenGuidance
from ..layers.norms import normalization
from ..schedulers.learned_variance import learned_variance_scheduler, previous_gaussian, reverse_steps


__all__ = ["DiffusionHead", "head_scheduler"]


def head_scheduler(timestep_spacing: str = "linspace") -> DDPMScheduler:
    """The diffusion of heads in MAR and l-DeTok: cosine betas, see `learned_variance_scheduler`."""
    return learned_variance_scheduler("squaredcos_cap_v2", timestep_spacing)


class DiffusionHeadBlock(nn.Module):
    """x + gate * mlp(norm(x) * (1 + scale) + shift), modulated by the condition; all are (..., dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = normalization("layer_norm", dim)
        self.linear_1 = nn.Linear(dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.modulation = nn.Linear(dim, 3 * dim)

    def forward(self, hidden_states, condition):
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        mixed = self.linear_2(F.silu(self.linear_1(self.norm(hidden_states, shift, scale))))
        return torch.addcmul(hidden_states, gate, mixed)


class DiffusionHead(nn.Module):
    """Denoises each token independently: noisy token, time and condition -> noise and variance.

    Args:
        token_dim: width of a token.
        condition_dim: width of the conditions.
        dim, num_layers: width and depth of the MLP.
    """

    def __init__(self, token_dim: int, condition_dim: int, dim: int, num_layers: int):
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, dim)
        self.condition_proj = nn.Linear(condition_dim, dim)
        self.proj_in = nn.Linear(token_dim, dim)
        self.blocks = nn.ModuleList(DiffusionHeadBlock(dim) for _ in range(num_layers))
        self.norm_out = normalization("layer_norm", dim, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, 2 * token_dim)

    def initialize_weights(self) -> None:
        """Xavier for linear maps, a standard deviation of 0.02 for the time, zero for modulations and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.time_embedding.linear_1, self.time_embedding.linear_2):
            nn.init.normal_(embedding.weight, std=0.02)
        for zeroed in (*(block.modulation for block in self.blocks), self.modulation_out, self.proj_out):
            nn.init.zeros_(zeroed.weight)

    def forward(self, noisy_tokens: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Noise, then variance, (..., 2 * token_dim).

        Args:
            noisy_tokens: (..., token_dim).
            timestep: (...), whole numbers from 0 (nearly data) to 999 (noise).
            condition: (..., condition_dim), broadcast over the other axes.
        """
        dtype = condition.dtype
        time = self.time_proj(timestep.flatten()).unflatten(0, timestep.shape).to(dtype)  # sinusoids in fp32
        condition = F.silu(self.time_embedding(time) + self.condition_proj(condition))
        hidden_states = self.proj_in(noisy_tokens.to(dtype))
        for block in self.blocks:
            hidden_states = block(hidden_states, condition)
        shift, scale = self.modulation_out(condition).chunk(2, dim=-1)
        return self.proj_out(self.norm_out(hidden_states, shift, scale))

    @torch.no_grad()
    def sample_tokens(
        self,
        condition: torch.Tensor,
        noise: torch.Tensor,
        scheduler: DDPMScheduler,
        num_steps: int = 100,
        temperature: float = 1.0,
        negative_condition: torch.Tensor | None = None,
        guidance: TokenGuidance = TokenGuidance(),  # noqa: B008 - a frozen value
        scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Sample tokens, all at once, by ancestral sampling (l-DeTok: 100 re-spaced steps).

        Args:
            condition: (B, K, condition_dim).
            noise: (B, K, token_dim), where sampling starts.
            scheduler: with the betas of training; its timesteps are overwritten.
            num_steps: evaluations of the head.
            temperature: factor of the noise that each step adds.
            negative_condition: as `condition`, to guide away from; guidance applies to the noise, while the variance
                is that of `condition`.
            guidance, scale: how to combine the two.
            generator: of the noise that steps add; a list has one for each of B, which makes tokens independent of
                their batch.

        Returns:
            (B, K, token_dim) in fp32.

        Raises:
            ValueError: a `num_steps` that the scheduler does not support.
        """
        tokens, is_guided = noise.float(), negative_condition is not None
        if is_guided:
            condition = torch.cat([condition, negative_condition])
        steps = reverse_steps(scheduler, num_steps, tokens.device)
        for step, (time, alphas_cumprod, previous) in enumerate(steps, start=1):
            timestep = torch.full((1, 1), time, device=tokens.device)
            predicted = self(tokens.repeat(1 + is_guided, 1, 1), timestep, condition).float()
            predicted_noise, variance = predicted.chunk(2, dim=-1)
            if is_guided:
                predicted_noise = guidance.combine(*predicted_noise.chunk(2), scale)
                variance = variance[: len(tokens)]
            tokens, log_variance = previous_gaussian(predicted_noise, variance, tokens, alphas_cumprod, previous)
            if step < len(steps):
                fresh = randn_tensor(tokens.shape, generator=generator, device=tokens.device, dtype=tokens.dtype)
                tokens = torch.addcmul(tokens, (0.5 * log_variance).exp(), fresh, value=temperature)
        return tokens
