"""Where a token lies on its grid: the fixed sin-cos table that is added, and rotary angles that turn q and k."""

import torch
from diffusers.models.embeddings import apply_rotary_emb, get_2d_sincos_pos_embed_from_grid
from torch import nn


__all__ = [
    "SinCosPositions",
    "apply_rotary",
    "axial_angles",
    "grid_positions",
    "grid_size",
    "rotary_angles",
    "token_grid",
]


def grid_size(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a config value that is one number for squares or a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def token_grid(size: int | list[int] | tuple[int, int], patch_size: int, name: str = "sample_size") -> tuple[int, int]:
    """Patches of a size along its height and width; `name` is what an error calls it.

    Raises:
        ValueError: the size is no multiple of the patch size.
    """
    height, width = grid_size(size)
    if height % patch_size or width % patch_size:
        raise ValueError(f"{name} must be a multiple of patch_size {patch_size}, got {size}")
    return height // patch_size, width // patch_size


def sincos_table(dim: int, grid: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
    """2-D sin-cos embeddings (1, height * width, dim) in fp32; as in MAE, the first half of `dim` is the column."""
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], device=device), torch.arange(grid[1], device=device), indexing="ij"
    )
    return get_2d_sincos_pos_embed_from_grid(dim, torch.stack([columns, rows]), output_type="pt").float()[None]


class SinCosPositions(nn.Module):
    """Fixed 2-D sin-cos positions for a grid; other grids are computed when they come.

    Args:
        dim: width of the tokens.
        grid: rows and columns of training.
        counted: whether the paper counts this table among the parameters, see `hf_fae.inspection`.
    """

    def __init__(self, dim: int, grid: tuple[int, int], counted: bool = True):
        super().__init__()
        self.dim, self.grid, self.counted = dim, grid, counted
        self.register_buffer("table", sincos_table(dim, grid), persistent=False)

    def _apply(self, fn, recurse=True):
        was_meta = self.table.is_meta
        super()._apply(fn, recurse)
        # Neither may a cast to half precision round the table, nor leaving the meta device leave it undefined.
        if self.table.dtype != torch.float32 or was_meta:
            self.table = sincos_table(self.dim, self.grid, self.table.device)
        return self

    def forward(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Embeddings (1, height * width, dim) in fp32."""
        # Not the buffer itself, which an offloading hook takes away as soon as this returns.
        return self.table.detach() if grid == self.grid else sincos_table(self.dim, grid, device)


def axial_angles(axes: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (N, head_dim / 2) in fp32 of rotary positions with several axes, theta 10000.

    A head is made of pairs of neighbouring channels; each axis turns its own pairs.

    Args:
        axes: for each axis the positions (N,) of the tokens, and how many channels of a head turn with it.
    """
    angles = []
    for positions, channels in axes:
        exponents = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32) / channels
        angles.append(positions[:, None] * 10000.0**-exponents)
    angles = torch.cat(angles, dim=-1)
    return angles.cos(), angles.sin()


def grid_positions(grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column (height * width,) of each token of a grid, in raster order."""
    rows = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    return rows, torch.arange(grid[1], device=device).repeat(grid[0])


def rotary_angles(head_dim: int, grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (height * width, head_dim / 2) of 2-D rotary positions: half of the pairs turn with the row."""
    return axial_angles([(positions, head_dim // 2) for positions in grid_positions(grid, device)])


def apply_rotary(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys (batch, tokens, heads, head_dim) by the angles of `rotary_angles`, in fp32."""
    if torch.compiler.is_compiling():
        angles = (cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1))
        return apply_rotary_emb(hidden_states, angles, sequence_dim=1)
    # One complex product is three to six times as fast as the real form in eager mode; the compiler cannot fuse it.
    return apply_rotary_emb(hidden_states, torch.complex(cos, sin)[None], use_real=False)
