"""The inverse of one block of STARFlow: tokens from noise, one after the other or by Jacobi iteration."""

from dataclasses import dataclass

import torch

from ..guidance import FlowGuidance
from ..layers.kv_cache import KVCache
from .starflow_block import STARFlowBlock


__all__ = ["BlockInverse"]


@dataclass
class BlockInverse:
    """The inverse of one block for one batch: noise (B, N, C) -> tokens (B, N, C), with keys and values cached.

    The network runs in `dtype`; all arithmetic around it is fp32.

    Attributes:
        block, rotary_emb: the block, and the angles of its whole sequence, of prefix and tokens.
        cache: an empty one for that sequence.
        prefix: (B, P, dim), the condition; with `guidance` (2B, P, dim), the negative ones last; None without one.
        guidance: how the conditional and the negative prediction are combined; None without guidance.
    """

    block: STARFlowBlock
    rotary_emb: tuple[torch.Tensor, torch.Tensor]
    cache: KVCache
    dtype: torch.dtype
    prefix: torch.Tensor | None = None
    guidance: FlowGuidance | None = None

    def __call__(self, noise: torch.Tensor, jacobi_block_size: int, jacobi_tolerance: float) -> torch.Tensor:
        """Tokens in fp32, in the order of the block; see `STARFlowTransformer2DModel.inverse_block`."""
        mean, scale = self._predict(noise[:, :0])
        tokens = [noise[:, :1] * scale + mean]
        for start in range(1, noise.shape[1], jacobi_block_size):
            part = noise[:, start : start + jacobi_block_size]
            tokens.append(self._iterate(tokens[-1][:, -1:], part, jacobi_tolerance))
        return torch.cat(tokens, dim=1)

    def _predict(self, previous):
        """Mean and scale, guided, of the tokens that follow `previous`."""
        previous = previous.to(self.dtype)
        if self.guidance is None:
            return self.block(previous, self.rotary_emb, self.prefix, self.cache)
        mean, scale = self.block(previous.repeat(2, 1, 1), self.rotary_emb, self.prefix, self.cache)
        (mean, negative_mean), (scale, negative_scale) = mean.chunk(2), scale.chunk(2)
        return self.guidance.combine(mean, scale, negative_mean, negative_scale)

    def _iterate(self, last, noise, tolerance):
        """The tokens x with x = noise * scale + mean, where mean and scale follow from `last` and x, shifted by one.

        Each sweep fixes at least one more token, so that as many sweeps as tokens are exact. An image that has
        converged is left alone: it does not depend on the others of its batch.

        Args:
            last: (B, 1, C), the token before these.
            noise: (B, n, C).
        """
        place, count = self.cache.length, noise.shape[1]
        previous = torch.cat([last, noise[:, :-1]], dim=1)
        converged = torch.zeros(len(noise), 1, 1, dtype=torch.bool, device=noise.device)
        for sweep in range(count):
            self.cache.length = place
            mean, scale = self._predict(previous)
            tokens = noise * scale + mean
            if sweep == count - 1:
                break
            following = torch.cat([last, tokens[:, :-1]], dim=1)
            change = (following - previous).square().mean((1, 2), keepdim=True)
            converged = converged | (change <= tolerance * following.square().mean((1, 2), keepdim=True))
            if converged.all():
                break
            previous = torch.where(converged, previous, following)
        return tokens
