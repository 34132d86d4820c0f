"""The pre-norm transformer block of the decoders, and the feed-forwards that blocks choose from."""

from diffusers.models.attention import FeedForward
from torch import nn

from .attention import SelfAttention
from .norms import normalization


__all__ = ["TransformerBlock", "feed_forward"]


def feed_forward(ff_type: str, dim: int, multiple_of: int = 1) -> FeedForward:
    """diffusers' feed-forward with the MLP ratio 4 of all papers.

    `"gelu"` is 4 * dim wide. `"swiglu"` has three matrices, so 2/3 of that keeps the parameters equal, rounded down as
    in LightningDiT, or up to a multiple: 2736 for 1024 is what FAE's published pixel decoder counts.

    Raises:
        ValueError: another `ff_type`.
    """
    if ff_type == "swiglu":
        width = 8 * dim // 3 if multiple_of == 1 else -(-8 * dim // (3 * multiple_of)) * multiple_of
        return FeedForward(dim, inner_dim=width, activation_fn="swiglu")
    if ff_type == "gelu":
        return FeedForward(dim, inner_dim=4 * dim, activation_fn="gelu-approximate")
    raise ValueError(f"ff_type must be 'swiglu' or 'gelu', got {ff_type!r}")


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); tokens (batch, tokens, dim)."""

    def __init__(self, dim: int, heads: int, norm_type: str, ff_type: str = "swiglu", is_causal: bool = False):
        super().__init__()
        self.norm1 = normalization(norm_type, dim)
        self.attn = SelfAttention(dim, heads, dim // heads, is_causal=is_causal)
        self.norm2 = normalization(norm_type, dim)
        self.ff = feed_forward(ff_type, dim, multiple_of=8)

    def forward(self, hidden_states, rotary_emb=None, cache=None):
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), rotary_emb, cache)
        return hidden_states + self.ff(self.norm2(hidden_states))
