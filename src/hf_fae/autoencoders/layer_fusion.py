"""DRoRAE's fusion of the layers of a frozen encoder (arXiv 2605.10780, section 3.2)."""

import torch
from torch import nn
from torch.nn import functional as F


__all__ = ["ACTIVATIONS", "LayerFusion", "backbone_norm"]

NORM_EPS = 1e-6  # of the backbones' own final norm, here without its gain and bias
ENERGY_EPS = 1e-6
ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}


def backbone_norm(tokens: torch.Tensor) -> torch.Tensor:
    """LN_bb: zero mean and unit variance over the channels of each token."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


class LayerExpert(nn.Module):
    """One layer's contribution (B, N, C) to the fused tokens: linear, norm, activation, linear (appendix A)."""

    def __init__(self, feature_dim: int, hidden_size: int, activation: str):
        super().__init__()
        self.proj_in = nn.Linear(feature_dim, hidden_size)
        self.activation = ACTIVATIONS[activation]
        self.proj_out = nn.Linear(hidden_size, feature_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.proj_in(tokens)
        return self.proj_out(self.activation(F.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPS)))


class LayerFusion(nn.Module):
    """Normalised layer states (B, L, N, C) -> tokens (B, N, C): one expert a layer, weighted anew for each token.

    The weights are the router's raw outputs, of any sign: unlike under a softmax, layers do not compete, and may
    count against each other.
    """

    def __init__(self, feature_dim: int, num_layers: int, hidden_size: int, activation: str):
        super().__init__()
        self.experts = nn.ModuleList(LayerExpert(feature_dim, hidden_size, activation) for _ in range(num_layers))
        self.router = nn.Linear(num_layers * feature_dim, num_layers)

    def forward(self, layers: torch.Tensor) -> torch.Tensor:
        weights = self.router(layers.transpose(1, 2).flatten(2))  # (B, N, L)
        mixed = 0
        for index, expert in enumerate(self.experts):
            mixed = mixed + weights[..., index, None] * backbone_norm(expert(layers[:, index]))
        energy = weights.square().sum(-1, keepdim=True)
        # The norm that follows cancels this divisor. It stays, as in the paper: activations and gradients keep unit
        # scale for any output of the router.
        return backbone_norm(mixed / (energy + ENERGY_EPS).sqrt())
