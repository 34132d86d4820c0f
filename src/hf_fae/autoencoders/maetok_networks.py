"""The networks of MAETok (arXiv 2502.03444): a ViT between images and latent tokens, in both directions.

Both halves are stacks of blocks on one sequence: patches on a grid, then latent tokens.
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..layers.attention import SelfAttention
from ..layers.blocks import BlockStack, TransformerBlock, feed_forward, init_vit_weights
from ..layers.norms import normalization
from ..layers.positions import LearnedRotary, rotary_angles


__all__ = ["MAETokDecoder", "MAETokEncoder"]

LAYER_SCALE = 1e-5  # initial value, as in DINOv2's ViT, which both networks follow


class ModulatedBlock(nn.Module):
    """The block of the released decoders: the raw latents modulate the latent tokens, which come last.

    Their normed activations become x * scale + shift, both computed from the latents (B, L, latent_channels), and both
    0 at initialisation.
    """

    def __init__(self, dim: int, heads: int, latent_channels: int):
        super().__init__()
        self.norm1 = normalization("layer_norm", dim, elementwise_affine=False)
        self.attn = SelfAttention(dim, heads, dim // heads)
        self.norm2 = normalization("layer_norm", dim, elementwise_affine=False)
        self.ff = feed_forward("exact_gelu", dim)
        self.modulation = nn.Linear(latent_channels, 4 * dim)

    def forward(self, hidden_states, rotary_emb, latents):
        shift_attn, scale_attn, shift_ff, scale_ff = self.modulation(F.silu(latents)).chunk(4, dim=-1)
        normed = _modulate_last(self.norm1(hidden_states), shift_attn, scale_attn)
        hidden_states = hidden_states + self.attn(normed, rotary_emb)
        return hidden_states + self.ff(_modulate_last(self.norm2(hidden_states), shift_ff, scale_ff))


def _modulate_last(tokens, shift, scale):
    others, last = tokens.split([tokens.shape[1] - shift.shape[1], shift.shape[1]], dim=1)
    return torch.cat([others, torch.addcmul(shift, last, scale)], dim=1)


class LatentTokenStack(BlockStack):
    """Blocks on patches, which have rotary positions, and on latent tokens, which add learned ones.

    Args:
        latent_channels: channels of the latents that modulate the blocks; None for plain blocks.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        heads: int,
        num_latent_tokens: int,
        rope_type: str,
        rope_theta: float,
        latent_channels: int | None = None,
    ):
        super().__init__()
        self.head_dim, self.rope_theta = dim // heads, rope_theta
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.latent_positions = nn.Parameter(torch.empty(num_latent_tokens, dim))
        self.rotary = None
        if rope_type == "learned":
            self.rotary = LearnedRotary(num_layers, heads, dim // heads, rope_theta)
        if latent_channels is None:
            blocks = [
                TransformerBlock(dim, heads, "layer_norm", "exact_gelu", layer_scale=LAYER_SCALE)
                for _ in range(num_layers)
            ]
        else:
            blocks = [ModulatedBlock(dim, heads, latent_channels) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = normalization("layer_norm", dim, elementwise_affine=latent_channels is None)

    def init_weights(self) -> None:
        """Subclasses call this once all of their parts exist."""
        init_vit_weights(self)
        nn.init.trunc_normal_(self.latent_positions, std=0.02)
        for block in self.blocks:
            if isinstance(block, ModulatedBlock):
                nn.init.zeros_(block.modulation.weight)

    def run(
        self,
        patches: torch.Tensor,
        latents: torch.Tensor,
        grid: tuple[int, int],
        *inputs: torch.Tensor,
        prefix: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run prefix, patches on a grid and latents as one sequence (B, P + N + L, dim); `inputs` go to all blocks."""
        latents = latents + self.latent_positions.to(latents.dtype)
        tokens = [patches, latents] if prefix is None else [prefix, patches, latents]
        if self.rotary is None:
            angles = rotary_angles(self.head_dim, grid, patches.device, self.rope_theta)
            cos, sin = (values[None, :, None] for values in angles)
        else:
            cos, sin = self.rotary(grid)
        # Axes are ..., tokens, heads, pairs. Only patches are rotated: all other tokens have angle 0.
        around = (0, 0, 0, 0, 0 if prefix is None else prefix.shape[1], latents.shape[1])
        rotary_emb = (F.pad(cos, around, value=1.0), F.pad(sin, around))
        if self.rotary is not None:  # one entry per layer
            rotary_emb = list(zip(*rotary_emb, strict=True))
        return self.run_blocks(torch.cat(tokens, dim=1), rotary_emb, *inputs)


class MAETokEncoder(LatentTokenStack):
    """Images (B, 3, H, W) -> latent tokens (B, L, latent_channels).

    Patches in `patch_mask` (B, N) are replaced by the mask token; none is dropped, and latent tokens are never masked.
    Patches have learned absolute positions beside their rotary ones (the reference code; the paper names only these).
    """

    def __init__(
        self,
        dim: int,
        *stack,
        num_latent_tokens: int,
        latent_channels: int,
        grid: tuple[int, int],
        patch_size: int,
        **rope,
    ):
        super().__init__(dim, *stack, num_latent_tokens=num_latent_tokens, **rope)
        self.proj_in = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.empty(grid[0] * grid[1], dim))
        self.class_token = nn.Parameter(0.02 * torch.randn(dim))
        self.latent_tokens = nn.Parameter(0.02 * torch.randn(num_latent_tokens, dim))
        self.proj_out = nn.Linear(dim, latent_channels)
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.init_weights()

    def forward(self, pixel_values: torch.Tensor, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
        patches = self.proj_in(pixel_values)
        grid = tuple(patches.shape[2:])
        patches = patches.flatten(2).transpose(1, 2).contiguous()
        if patch_mask is not None:
            patches = torch.where(patch_mask[..., None], self.mask_token.to(patches.dtype), patches)
        patches = patches + self.positions.to(patches.dtype)
        learned = (self.class_token[None], self.latent_tokens)
        prefix, latents = (part.to(patches.dtype).expand(len(patches), -1, -1) for part in learned)
        hidden_states = self.run(patches, latents, grid, prefix=prefix)
        return self.proj_out(self.norm_out(hidden_states[:, -latents.shape[1] :]))


class MAETokDecoder(LatentTokenStack):
    """Latent tokens (B, L, latent_channels) -> a vector (B, h * w, out_channels) for every cell of a grid.

    All cells share one mask token and differ by their rotary positions alone (the reference code; the paper has one
    token for each cell).

    Args:
        class_token: put a learned token without a position before the mask tokens.
    """

    def __init__(
        self,
        dim: int,
        *stack,
        latent_channels: int,
        grid: tuple[int, int],
        out_channels: int,
        decoder_type: str,
        class_token: bool = False,
        **kwargs,
    ):
        modulation = {"latent_channels": latent_channels if decoder_type == "modulated" else None}
        super().__init__(dim, *stack, **modulation, **kwargs)
        self.grid, self.decoder_type = grid, decoder_type
        self.proj_in = nn.Linear(latent_channels, dim)
        self.class_token = nn.Parameter(0.02 * torch.randn(dim)) if class_token else None
        self.proj_out = nn.Linear(dim, out_channels)
        self.init_weights()

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        tokens = self.proj_in(latents)
        batch_size, num_latents, _ = tokens.shape
        num_cells = self.grid[0] * self.grid[1]
        masks = self.mask_token.to(tokens.dtype).expand(batch_size, num_cells, -1)
        prefix = None if self.class_token is None else self.class_token.to(tokens.dtype).expand(batch_size, 1, -1)
        inputs = [latents] if self.decoder_type == "modulated" else []
        hidden_states = self.run(masks, tokens, self.grid, *inputs, prefix=prefix)
        # In the released weights the last norm modulates as well, but only the latent tokens, which are dropped here.
        return self.proj_out(self.norm_out(hidden_states[:, -num_cells - num_latents : -num_latents]))
