"""Where a token lies on its grid: the fixed sin-cos table that is added, and rotary angles that turn q and k."""

import math

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from torch import nn


__all__ = [
    "LearnedRotary",
    "SinCosPositions",
    "apply_rotary",
    "axial_angles",
    "grid_positions",
    "grid_size",
    "rotary_angles",
    "token_grid",
    "unit_rotary_angles",
]


def grid_size(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a config value that is one number for squares or a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def token_grid(size: int | list[int] | tuple[int, int], patch_size: int, name: str = "sample_size") -> tuple[int, int]:
    """Patches of a size along its height and width; `name` is what an error calls it.

    Raises:
        ValueError: the size is no positive multiple of the patch size.
    """
    height, width = grid_size(size)
    if patch_size < 1:
        raise ValueError(f"patch_size must be positive, got {patch_size}")
    if height % patch_size or width % patch_size or height < 1 or width < 1:
        raise ValueError(f"{name} must be a positive multiple of patch_size {patch_size}, got {size}")
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


def axial_angles(axes: list[tuple[torch.Tensor, int]], theta: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (N, head_dim / 2) in fp32 of rotary positions with several axes.

    A head is made of pairs of neighbouring channels; each axis turns its own pairs.

    Args:
        axes: for each axis the positions (N,) of the tokens, and how many channels of a head turn with it.
        theta: the wavelength of the slowest pair would be 2 pi theta.
    """
    angles = []
    for positions, channels in axes:
        exponents = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32) / channels
        angles.append(positions[:, None] * theta**-exponents)
    angles = torch.cat(angles, dim=-1)
    return angles.cos(), angles.sin()


def grid_positions(grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column (height * width,) of each token of a grid, in raster order."""
    rows = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    return rows, torch.arange(grid[1], device=device).repeat(grid[0])


def rotary_angles(
    head_dim: int, grid: tuple[int, int], device: torch.device, theta: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (height * width, head_dim / 2) of 2-D rotary positions: half of the pairs turn with the row."""
    return axial_angles([(positions, head_dim // 2) for positions in grid_positions(grid, device)], theta)


def unit_rotary_angles(
    head_dim: int, grid: tuple[int, int], device: torch.device, as_released: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of l-DeTok's 2-D rotary positions: from 0 to 1 along each side, 7 to 7e-4 turns from one to another.

    As in `rotary_angles` the first half of the pairs turns with the row.

    Args:
        as_released: the reference code lists the angles of an axis twice, one list after the other, and pairs
            neighbouring channels: these get two different angles, and lengths are not kept. Its weights need it so.

    Returns:
        (height * width, head_dim / 2), an angle for a pair; with `as_released` (height * width, head_dim), one for a
        channel.
    """
    frequencies = 2 * math.pi * torch.logspace(math.log10(7), math.log10(7e-4), head_dim // 4, device=device)
    angles = []
    for positions, size in zip(grid_positions(grid, device), grid, strict=True):
        turned = torch.linspace(0, 1, size, device=device)[positions, None] * frequencies
        angles += [turned, turned] if as_released else [turned]
    angles = torch.cat(angles, dim=-1)
    return angles.cos(), angles.sin()


class LearnedRotary(nn.Module):
    """2-D rotary positions whose frequencies are learned for each layer and head (RoPE-Mixed, arXiv 2403.13298).

    At first they have the magnitudes of the axial ones, in two directions at right angles that are random for each
    head. `frequencies` is (2, num_layers, heads, head_dim / 2), of rows and of columns.
    """

    def __init__(self, num_layers: int, heads: int, head_dim: int, theta: float):
        super().__init__()
        magnitudes = theta ** -(torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim)
        directions = 2 * math.pi * torch.rand(num_layers, heads, 1)
        directions = torch.cat([directions, directions + math.pi / 2], dim=-1)[..., None]
        frequencies = torch.stack([directions.sin(), directions.cos()]) * magnitudes
        self.frequencies = nn.Parameter(frequencies.flatten(3))

    def forward(self, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (num_layers, 1, height * width, heads, head_dim / 2) in fp32."""
        frequencies = self.frequencies.float()[:, :, None, None]
        rows, columns = (positions[:, None, None] for positions in grid_positions(grid, frequencies.device))
        angles = rows * frequencies[0] + columns * frequencies[1]
        return angles.cos(), angles.sin()


def apply_rotary(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of neighbouring channels of queries or keys (batch, tokens, heads, head_dim), in fp32.

    Args:
        cos, sin: (tokens, head_dim / 2), an angle for each pair; with axes for batch and heads where these differ:
            (batch or 1, tokens, heads or 1, head_dim / 2). An angle for each channel is the last axis head_dim.
    """
    if cos.ndim == 2:
        cos, sin = cos[None, :, None], sin[None, :, None]
    of_pairs = 2 * cos.shape[-1] == hidden_states.shape[-1]
    if of_pairs and not torch.compiler.is_compiling():
        # One complex product is three to six times as fast as the real form; but the compiler cannot fuse it.
        pairs = torch.view_as_complex(hidden_states.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(3).type_as(hidden_states)
    if of_pairs:
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    real, imaginary = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (hidden_states.float() * cos + turned.float() * sin).type_as(hidden_states)
