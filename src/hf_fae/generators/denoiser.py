"""What all denoisers share: latents to tokens, tokens to a prediction, and initial weights."""

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from torch import nn
from torch.nn import functional as F

from ..modeling import StrictModelMixin


__all__ = ["LatentDenoiser", "initialize_ends", "xavier_linear_maps"]


class LatentDenoiser(StrictModelMixin, AttentionMixin, PeftAdapterMixin):
    """Base of denoisers of latents (B, in_channels, H, W) with `config.patch_size`.

    They have `proj_in`, `pos_embed`, `time_embedding`, `norm_out`, `modulation_out` and `proj_out`.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    def patch_grid(self, hidden_states: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of latents.

        Raises:
            ValueError: latents of another shape.
        """
        in_channels, patch_size = self.config.in_channels, self.config.patch_size
        if hidden_states.ndim != 4 or hidden_states.shape[1] != in_channels:
            raise ValueError(
                f"hidden_states must have shape (batch, {in_channels}, height, width), "
                f"got {tuple(hidden_states.shape)}"
            )
        height, width = hidden_states.shape[2:]
        if height % patch_size or width % patch_size or height * width == 0:
            raise ValueError(f"hidden_states must have sides that are multiples of {patch_size}, got {height}x{width}")
        return height // patch_size, width // patch_size

    def embed_patches(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens (B, rows * columns, dim) of latents, with their positions added."""
        # Element-wise results inherit the layout: without this copy every layer would compute on channel-major tokens.
        tokens = self.proj_in(hidden_states).flatten(2).transpose(1, 2).contiguous()
        return tokens + self.pos_embed(grid, tokens.device).to(tokens.dtype)

    def predict(self, tokens: torch.Tensor, condition: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The prediction (B, channels, H, W) of tokens (B, rows * columns, dim), modulated by a condition of shape
        (B, 1 or tokens, dim)."""
        shift, scale = self.modulation_out(condition).chunk(2, dim=-1)
        patches = self.proj_out(self.norm_out(tokens, shift, scale))
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, grid), self.config.patch_size)

    def run_block(self, block: nn.Module, *inputs):
        """`block(*inputs)`, without storing its activations under gradient checkpointing."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


def xavier_linear_maps(model: nn.Module) -> None:
    """Xavier for all linear maps of `model`, with biases of zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialize_ends(patch_projections: list[nn.Conv2d], embeddings: list[nn.Module], zeroed: list[nn.Linear]) -> None:
    """As DiT: Xavier for the projections of patches, 0.02 for embeddings, zero for modulations and outputs."""
    for projection in patch_projections:
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)
    for embedding in embeddings:
        nn.init.normal_(embedding.weight, std=0.02)
    for module in zeroed:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
