"""The pre-norm transformer block of tokenizers, stacks of it, and the feed-forwards of all blocks."""

import torch
from diffusers.models.attention import FeedForward
from torch import nn

from .attention import SelfAttention
from .norms import normalization


__all__ = ["BlockStack", "TransformerBlock", "feed_forward", "init_vit_weights"]


def feed_forward(ff_type: str, dim: int, multiple_of: int = 1, bias: bool = True) -> FeedForward:
    """diffusers' feed-forward with the MLP ratio 4 of all papers.

    `"gelu"` (its tanh approximation) and `"exact_gelu"` are 4 * dim wide. `"swiglu"` has three matrices, so 2/3 of
    that width has as many parameters: rounded down as in LightningDiT, or up to a multiple (2736 for 1024 matches the
    published count of FAE's pixel decoder).

    Raises:
        ValueError: another `ff_type`.
    """
    if ff_type == "swiglu":
        width = 8 * dim // 3 if multiple_of == 1 else -(-8 * dim // (3 * multiple_of)) * multiple_of
        return FeedForward(dim, inner_dim=width, activation_fn="swiglu", bias=bias)
    if ff_type in ("gelu", "exact_gelu"):
        activation = "gelu-approximate" if ff_type == "gelu" else "gelu"
        return FeedForward(dim, inner_dim=4 * dim, activation_fn=activation, bias=bias)
    raise ValueError(f"ff_type must be 'swiglu', 'gelu' or 'exact_gelu', got {ff_type!r}")


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (arXiv 2103.17239)."""

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), value))

    def forward(self, hidden_states):
        return hidden_states * self.weight


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); tokens (batch, tokens, dim).

    Args:
        ff_multiple_of: as in `feed_forward`.
        layer_scale: initial value of a `LayerScale` behind both branches; None without.
        dropout: as in `SelfAttention`; the feed-forward has none.
        norm_eps: epsilon of both norms.
        qk_norm: as in `SelfAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        norm_type: str,
        ff_type: str = "swiglu",
        is_causal: bool = False,
        ff_multiple_of: int = 8,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.norm1 = normalization(norm_type, dim, eps=norm_eps)
        self.attn = SelfAttention(dim, heads, dim // heads, qk_norm, is_causal=is_causal, dropout=dropout)
        self.norm2 = normalization(norm_type, dim, eps=norm_eps)
        self.ff = feed_forward(ff_type, dim, multiple_of=ff_multiple_of)
        self.scale1, self.scale2 = (
            nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2)
        )

    def forward(self, hidden_states, rotary_emb=None, cache=None, attention_mask=None):
        attended = self.attn(self.norm1(hidden_states), rotary_emb, cache, attention_mask)
        hidden_states = hidden_states + self.scale1(attended)
        return hidden_states + self.scale2(self.ff(self.norm2(hidden_states)))


class BlockStack(nn.Module):
    """Base of networks with consecutive `blocks`, with gradient checkpointing for each."""

    gradient_checkpointing = False

    def run_blocks(self, hidden_states: torch.Tensor, *inputs) -> torch.Tensor:
        """Apply all blocks to tokens (batch, tokens, dim); an input that is a list has one entry for each block."""
        for index, block in enumerate(self.blocks):
            block_inputs = [value[index] if isinstance(value, list) else value for value in inputs]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, *block_inputs)
            else:
                hidden_states = block(hidden_states, *block_inputs)
        return hidden_states


def init_vit_weights(module: nn.Module) -> None:
    """Initialize linear maps and convolutions of `module` as in ViT: truncated normal of 0.02, bias 0."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
