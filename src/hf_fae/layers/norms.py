"""RMSNorm and LayerNorm, chosen by name."""

import torch
from torch import nn


__all__ = ["RMSNorm", "normalization"]


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, on a CPU in two passes over the data instead of five (torch has no fused kernel there)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(hidden_states)
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(norm.square() / hidden_states.shape[-1] + self.eps)
        return hidden_states * inverse.to(hidden_states.dtype) * self.weight


def normalization(norm_type: str, dim: int, elementwise_affine: bool = True) -> nn.Module:
    """`"rms_norm"` (which always has its gain) or `"layer_norm"`, eps 1e-6.

    Raises:
        ValueError: another `norm_type`.
    """
    if norm_type == "rms_norm":
        return RMSNorm(dim, eps=1e-6)
    if norm_type == "layer_norm":
        return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=elementwise_affine)
    raise ValueError(f"norm_type must be 'rms_norm' or 'layer_norm', got {norm_type!r}")
