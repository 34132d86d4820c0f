"""One block of STARFlow: a causal transformer that predicts mean and scale of every token from those before it."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ..layers.blocks import TransformerBlock
from ..layers.norms import RMSNorm
from ..layers.positions import axial_angles, grid_positions


__all__ = ["CAPTION_CHANNELS", "UNIT_SCALE", "STARFlowBlock", "sequence_angles", "soft_clip"]

# softplus(UNIT_SCALE) = 1: an untrained block is the identity.
UNIT_SCALE = math.log(math.e - 1)
# Channels of a head that turn with the position in the caption, whatever the head's width (reference code).
CAPTION_CHANNELS = 16


def soft_clip(values: torch.Tensor) -> torch.Tensor:
    """Values in (-4, 4), with slope 1 at 0."""
    return 4 * torch.tanh(values / 4)


def sequence_angles(
    head_dim: int, grid: tuple[int, int], trained_side: float, words: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (P + height * width, head_dim / 2) of rotary positions of a prefix of P tokens and an image.

    Half of a head's channels beyond `CAPTION_CHANNELS` turn with the row, half with the column, both from 0 and scaled
    so that every grid is as large as that of training. The prefix has row and column 0.

    Positions count places in the sequence: a block that reads backwards sees the grid turned by 180 degrees.

    Args:
        grid: rows and columns of tokens.
        trained_side: side of the square with as many tokens as the grid of training.
        words: (P,) fp32, the caption positions of the prefix, on the device of the result.
    """
    scale, axis = trained_side / math.sqrt(math.prod(grid)), head_dim // 2 - CAPTION_CHANNELS // 2
    rows, columns = (F.pad(scale * positions, (len(words), 0)) for positions in grid_positions(grid, words.device))
    words = F.pad(words, (0, math.prod(grid)))
    return axial_angles([(rows, axis), (columns, axis), (words, CAPTION_CHANNELS)])


class STARFlowBlock(nn.Module):
    """A causal transformer over tokens of `token_dim` channels, `dim` wide.

    The first token is predicted from a learned start token, which has as many channels as the data.
    """

    def __init__(self, token_dim: int, dim: int, num_layers: int, heads: int):
        super().__init__()
        self.start_token = nn.Parameter(0.02 * torch.randn(token_dim))
        self.proj_in = nn.Linear(token_dim, dim)
        self.layers = nn.ModuleList(
            TransformerBlock(dim, heads, "layer_norm", "exact_gelu", is_causal=True, norm_eps=1e-5)
            for _ in range(num_layers)
        )
        self.norm_out = RMSNorm(dim, eps=1e-6)
        self.proj_out = nn.Linear(dim, 2 * token_dim)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.gradient_checkpointing = False

    def forward(self, tokens, rotary_emb, prefix=None, cache=None):
        """Means and scales of the tokens that follow `tokens`; also of the very first one, unless a cache has it.

        Args:
            tokens: (B, n, token_dim), those before the predicted ones; with a cache only those that it lacks.
            rotary_emb: angles of the whole sequence, of prefix and tokens (`sequence_angles`).
            prefix: (B, P, dim), read before all tokens.
            cache: `KVCache` to which the new tokens are added; at its first use also prefix and start token.

        Returns:
            Two tensors (B, n or n + 1, token_dim) in fp32.
        """
        first = 0 if cache is None else cache.length
        if first == 0:
            start = self.start_token.to(tokens.dtype).expand(len(tokens), 1, -1)
            tokens = torch.cat([start, tokens], dim=1)
        hidden_states = self.proj_in(tokens)
        if first == 0 and prefix is not None:
            hidden_states = torch.cat([prefix.to(hidden_states.dtype), hidden_states], dim=1)
        count = hidden_states.shape[1]
        rotary_emb = tuple(angles[first : first + count] for angles in rotary_emb)
        caches = [None] * len(self.layers) if cache is None else cache.extend(count)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states, rotary_emb)
            else:
                hidden_states = layer(hidden_states, rotary_emb, cache=layer_cache)
        predicted = self.proj_out(self.norm_out(hidden_states[:, -tokens.shape[1] :]))
        mean, scale = soft_clip(predicted.float()).chunk(2, dim=-1)
        return mean, F.softplus(scale + UNIT_SCALE)
