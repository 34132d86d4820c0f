"""The ViT that decodes the features of a vision encoder to an image (FAE, section 4.2), and its two output heads."""

import torch
from torch import nn
from torch.nn import functional as F

from ..layers.blocks import BlockStack, TransformerBlock
from ..layers.positions import SinCosPositions


__all__ = ["LinearHead", "OverlapHead", "PixelDecoder"]


class OverlapHead(nn.Linear):
    """Tokens (B, height * width, dim) -> image (B, 3, height * p, width * p), without seams between patches.

    Each token predicts a window of twice its patch, centred on it; neighbouring windows are blended with Hann weights,
    which add up to 1 at every pixel.

    Args:
        dim: width of the tokens.
        patch_size: p, even.

    Raises:
        ValueError: an odd `patch_size`.
    """

    def __init__(self, dim: int, patch_size: int):
        if patch_size % 2:
            raise ValueError(f"patch_size must be even for pixel_head 'overlap', got {patch_size}")
        super().__init__(dim, 3 * (2 * patch_size) ** 2)
        self.patch_size = patch_size

    @classmethod
    def from_linear(cls, linear: "LinearHead") -> "OverlapHead":
        """A head that continues each patch of a trained linear head beyond its border, by its outermost pixels."""
        patch_size = linear.patch_size
        head = cls(linear.in_features, patch_size).to(linear.weight)
        inside = (torch.arange(2 * patch_size) - patch_size // 2).clamp(0, patch_size - 1)
        with torch.no_grad():
            for ours, theirs in ((head.weight, linear.weight), (head.bias, linear.bias)):
                patch = theirs.unflatten(0, (3, patch_size, patch_size))
                ours.copy_(patch[:, inside][:, :, inside].flatten(0, 2))
        return head

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        size = self.patch_size
        windows = (
            super().forward(hidden_states).transpose(1, 2).unflatten(1, (3, 2, size, 2, size)).unflatten(-1, grid)
        )
        down, across = (self._blending_weights(count, hidden_states.device) for count in grid)
        blended = windows * down[:, :, None, None, :, None] * across[:, :, None]  # (B, 3, 2, p, 2, p, height, width)
        # Quarters of windows lie on cells of p x p, shifted by half a patch; up to four of them meet in a cell.
        quarters = (
            F.pad(blended[:, :, below, :, right], (right, 1 - right, below, 1 - below))
            for below in range(2)
            for right in range(2)
        )
        image = F.pixel_shuffle(sum(quarters).flatten(1, 3), size).to(windows.dtype)
        return image[:, :, size // 2 : -(size // 2), size // 2 : -(size // 2)]

    def _blending_weights(self, count, device):
        """Weights (2, p, count) in fp32 along one axis: halves of a window, their pixels, windows."""
        size = self.patch_size
        centers = torch.arange(2 * size, device=device, dtype=torch.float32) + 0.5
        weights = torch.sin(torch.pi / (2 * size) * centers).square().view(2, size, 1).repeat(1, 1, count)
        weights[0, :, 0] = weights[1, :, -1] = 1  # a single window covers the borders of the image
        return weights


class LinearHead(nn.Linear):
    """Tokens (B, height * width, dim) -> image (B, 3, height * p, width * p): each token predicts its patch."""

    def __init__(self, dim: int, patch_size: int):
        super().__init__(dim, 3 * patch_size**2)
        self.patch_size = patch_size

    def forward(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        patches = super().forward(hidden_states)
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, grid), self.patch_size)


HEADS = {"linear": LinearHead, "overlap": OverlapHead}


class PixelDecoder(BlockStack):
    """Features (B, height * width, feature_dim) -> image (B, 3, height * patch_size, width * patch_size), unclamped.

    Plain pre-norm ViT with LayerNorm, SwiGLU and fixed sin-cos positions: the reading of the published 305.36 M.

    Raises:
        ValueError: another `head` than `"linear"` and `"overlap"`, or an odd `patch_size` with the latter.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        patch_size: int,
        grid: tuple[int, int],
        head: str = "linear",
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"pixel_head must be 'linear' or 'overlap', got {head!r}")
        self.proj_in = nn.Linear(feature_dim, hidden_size)
        self.pos_embed = SinCosPositions(hidden_size, grid)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, num_attention_heads, "layer_norm") for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size, eps=1e-6)
        self.proj_out = HEADS[head](hidden_size, patch_size)

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        hidden_states = self.proj_in(features)
        hidden_states = hidden_states + self.pos_embed(grid, features.device).to(hidden_states.dtype)
        return self.proj_out(self.norm_out(self.run_blocks(hidden_states)), grid)
