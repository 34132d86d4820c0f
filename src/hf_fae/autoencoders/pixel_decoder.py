"""The ViT that paints an image from the features of a vision encoder (FAE, section 4.2)."""

import torch
from torch import nn
from torch.nn import functional as F

from ..layers.blocks import BlockStack, TransformerBlock
from ..layers.positions import SinCosPositions


__all__ = ["PixelDecoder"]


class PixelDecoder(BlockStack):
    """Features (B, height * width, feature_dim) -> image (B, 3, height * patch_size, width * patch_size), unclamped.

    Plain pre-norm ViT with LayerNorm, SwiGLU and fixed sin-cos positions: the reading of the published 305.36 M.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        patch_size: int,
        grid: tuple[int, int],
    ):
        super().__init__()
        self.patch_size = patch_size
        self.proj_in = nn.Linear(feature_dim, hidden_size)
        self.pos_embed = SinCosPositions(hidden_size, grid)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, num_attention_heads, "layer_norm") for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size, eps=1e-6)
        self.proj_out = nn.Linear(hidden_size, 3 * patch_size**2)

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        hidden_states = self.proj_in(features)
        hidden_states = hidden_states + self.pos_embed(grid, features.device).to(hidden_states.dtype)
        patches = self.proj_out(self.norm_out(self.run_blocks(hidden_states)))
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, grid), self.patch_size)
