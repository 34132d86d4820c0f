"""RAE's decoder (arXiv 2510.11690, section 3): a ViT from the tokens of a frozen encoder to pixels."""

import torch
from diffusers.models.attention import FeedForward
from torch import nn
from torch.nn import functional as F

from ..layers.attention import SelfAttention
from ..layers.blocks import BlockStack
from ..layers.positions import SinCosPositions


__all__ = ["RAEDecoder"]


class DecoderBlock(nn.Module):
    """The block of RAE's decoder, that of MAE: pre-norm, exact GELU, a feed-forward of any width."""

    def __init__(self, dim: int, heads: int, intermediate_size: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.attn = SelfAttention(dim, heads, dim // heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)
        self.ff = FeedForward(dim, inner_dim=intermediate_size, activation_fn="gelu")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.ff(self.norm2(hidden_states))


class RAEDecoder(BlockStack):
    """Tokens (B, N, C) -> pixels (B, 3, h * patch_size, w * patch_size) in the encoder's image normalisation.

    A ViT as in MAE: a class token before the patches, fixed sin-cos positions (published ViT-XL: 415,056,640).
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_size: int,
        num_layers: int,
        heads: int,
        intermediate_size: int,
        patch_size: int,
        grid: tuple[int, int],
    ):
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.proj_in = nn.Linear(feature_dim, hidden_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.pos_embed = SinCosPositions(hidden_size, grid, counted=False)
        self.blocks = nn.ModuleList(DecoderBlock(hidden_size, heads, intermediate_size) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(hidden_size, eps=1e-12)
        self.proj_out = nn.Linear(hidden_size, 3 * patch_size**2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.proj_in(tokens)
        tokens = tokens + self.pos_embed(self.grid, tokens.device).to(tokens.dtype)
        hidden_states = torch.cat([self.class_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        patches = self.proj_out(self.norm_out(self.run_blocks(hidden_states)[:, 1:]))
        # RAE's patches have their colours last, `pixel_shuffle` expects them first.
        patches = patches.unflatten(2, (self.patch_size**2, 3)).transpose(2, 3).flatten(2)
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, self.grid), self.patch_size)
