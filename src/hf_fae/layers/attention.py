"""Self-attention over image tokens, through diffusers' attention dispatch (backends, LoRA, QKV fusion)."""

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn
from torch.nn import functional as F

from .norms import RMSNorm
from .positions import apply_rotary


__all__ = ["SelfAttention", "SelfAttentionProcessor"]


class SelfAttentionProcessor:
    """q, k, v -> optional q/k norm -> optional rotary positions -> attention -> output projection.

    With a `cache` the queries attend to all of its tokens; without one to each other, or to those in a mask.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SelfAttention", hidden_states, rotary_emb=None, cache=None, attention_mask=None):
        """`attention_mask` is (B, 1, 1, tokens) bool, true for tokens to attend to; None for all."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, attn.head_dim)) for x in (query, key, value))
        if attn.norm_q is not None:
            query, key = attn.norm_q(query).to(value.dtype), attn.norm_k(key).to(value.dtype)
        if rotary_emb is not None:
            query, key = apply_rotary(query, *rotary_emb), apply_rotary(key, *rotary_emb)
        if cache is not None:
            key, value = cache.write(key, value)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask if cache is None else cache.mask,
            is_causal=attn.is_causal and cache is None,
            dropout_p=attn.dropout if attn.training else 0.0,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2)
        if attn.to_out is None:
            return hidden_states
        return F.dropout(attn.to_out[0](hidden_states), attn.dropout, attn.training)


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention (batch, tokens, dim) -> (batch, tokens, dim).

    Args:
        dim: width of the tokens.
        heads, head_dim: their product is the inner width, which may differ from `dim`.
        qk_norm: RMSNorm on the queries and keys of each head.
        project_out: with `False` the heads are returned without projection, (batch, tokens, heads * head_dim).
        is_causal: a token attends to itself and to earlier tokens.
        dropout: probability of dropping attention weights and elements of the projected output in training.
    """

    _default_processor_cls = SelfAttentionProcessor
    _available_processors = [SelfAttentionProcessor]

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        qk_norm: bool = False,
        project_out: bool = True,
        is_causal: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads, self.head_dim, self.is_causal, self.dropout = heads, head_dim, is_causal, dropout
        self.use_bias = True
        self.to_q = nn.Linear(dim, heads * head_dim)
        self.to_k = nn.Linear(dim, heads * head_dim)
        self.to_v = nn.Linear(dim, heads * head_dim)
        self.norm_q = RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.norm_k = RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, dim)]) if project_out else None
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states, rotary_emb=None, cache=None, attention_mask=None):
        return self.processor(self, hidden_states, rotary_emb, cache, attention_mask)
