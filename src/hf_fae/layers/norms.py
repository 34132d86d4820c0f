"""RMSNorm and LayerNorm, chosen by name, with the modulation of adaLN."""

import torch
from torch import nn
from torch.nn import functional as F


__all__ = ["LayerNorm", "RMSNorm", "normalization"]


def _rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`F.rms_norm`; on CPU, where torch has no fused kernel, with half as many passes over the tokens.

    There the norm is accumulated in fp32, rounded to the dtype of the tokens and applied in that dtype.
    """
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], weight, eps)
    # An fp32 norm costs a copy of the tokens in fp32, forward and backward; only float16 could overflow.
    dtype = torch.float32 if hidden_states.dtype == torch.float16 else None
    norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=dtype).float()
    inverse = torch.rsqrt(norm.square() / hidden_states.shape[-1] + eps)
    normed = hidden_states * inverse.to(hidden_states.dtype)
    return normed if weight is None else normed * weight.to(normed.dtype)


def _modulate(hidden_states: torch.Tensor, shift: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x * factor + shift in one pass."""
    return torch.addcmul(shift, hidden_states, factor.to(hidden_states.dtype))


class RMSNorm(nn.RMSNorm):
    """Tokens (B, N, C) -> x / rms(x) * weight; with `shift` and `scale` (B, 1 or N, C): that * (1 + scale) + shift
    (adaLN)."""

    def forward(self, hidden_states, shift=None, scale=None):
        if scale is None:
            return _rms_norm(hidden_states, self.weight, self.eps)
        # The gain is folded into the scale, which saves a pass over the tokens.
        return _modulate(_rms_norm(hidden_states, None, self.eps), shift, self.weight * (1 + scale))


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`; with `shift` and `scale` (B, 1 or N, C): that * (1 + scale) + shift (adaLN)."""

    def forward(self, hidden_states, shift=None, scale=None):
        normed = super().forward(hidden_states)
        return normed if scale is None else _modulate(normed, shift, 1 + scale)


def normalization(norm_type: str, dim: int, elementwise_affine: bool = True, eps: float = 1e-6) -> nn.Module:
    """`"rms_norm"` (always with gain) or `"layer_norm"`.

    Raises:
        ValueError: another `norm_type`.
    """
    if norm_type == "rms_norm":
        return RMSNorm(dim, eps=eps)
    if norm_type == "layer_norm":
        return LayerNorm(dim, eps=eps, elementwise_affine=elementwise_affine)
    raise ValueError(f"norm_type must be 'rms_norm' or 'layer_norm', got {norm_type!r}")
