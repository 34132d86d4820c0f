"""Positions of tokens on their grid: tables that are added, and rotary angles that turn queries and keys."""

import math

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid
from torch import nn


__all__ = [
    "LearnedPositions",
    "LearnedRotary",
    "SinCosPositions",
    "apply_rotary",
    "axial_angles",
    "grid_positions",
    "grid_size",
    "position_table",
    "rotary_angles",
    "token_grid",
    "unit_rotary_angles",
]


def grid_size(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a config value: one number for a square, or a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def token_grid(size: int | list[int] | tuple[int, int], patch_size: int, name: str = "sample_size") -> tuple[int, int]:
    """Rows and columns of patches of a size; errors call the size `name`.

    Raises:
        ValueError: the size is no positive multiple of the patch size.
    """
    height, width = grid_size(size)
    if patch_size < 1:
        raise ValueError(f"patch_size must be positive, got {patch_size}")
    if height % patch_size or width % patch_size or height < 1 or width < 1:
        raise ValueError(f"{name} must be a positive multiple of patch_size {patch_size}, got {size}")
    return height // patch_size, width // patch_size


def sincos_table(dim: int, grid: tuple[int, int], axes: int = 2, device: torch.device | None = None) -> torch.Tensor:
    """Fixed sin-cos embeddings (1, height * width, dim) in fp32.

    Args:
        axes: 2 for rows and columns: as in MAE, the first half of `dim` is the column, sines before cosines. 1 for the
            number n of a token in raster order: channels 2j and 2j + 1 are the sine and the cosine of
            n * 10000^(-2j / dim), as in MAETok's code.
    """
    if axes == 1:
        frequencies = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        angles = torch.arange(grid[0] * grid[1], device="cpu")[:, None] * frequencies
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()[None]
        return table.to(device or torch.get_default_device())
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], device=device), torch.arange(grid[1], device=device), indexing="ij"
    )
    return get_2d_sincos_pos_embed_from_grid(dim, torch.stack([columns, rows]), output_type="pt").float()[None]


class SinCosPositions(nn.Module):
    """Fixed sin-cos positions for a grid; tables of other grids are computed on demand.

    Args:
        dim: width of the tokens.
        grid: rows and columns of training.
        counted: whether the paper counts this table among the parameters, see `hf_fae.inspection`.
        axes: as in `sincos_table`.
    """

    def __init__(self, dim: int, grid: tuple[int, int], counted: bool = True, axes: int = 2):
        super().__init__()
        self.dim, self.grid, self.counted, self.axes = dim, grid, counted, axes
        self.register_buffer("table", sincos_table(dim, grid, axes), persistent=False)

    def _apply(self, fn, recurse=True):
        was_meta = self.table.is_meta
        super()._apply(fn, recurse)
        # A cast to half precision must not round the table, and leaving the meta device must fill it.
        if self.table.dtype != torch.float32 or was_meta:
            self.table = sincos_table(self.dim, self.grid, self.axes, self.table.device)
        return self

    def forward(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Embeddings (1, height * width, dim) in fp32."""
        # Not the buffer itself, which an offloading hook moves away as soon as this returns.
        return self.table.detach() if grid == self.grid else sincos_table(self.dim, grid, self.axes, device)


class LearnedPositions(nn.Module):
    """A learned table of positions for one grid, which starts as the sin-cos table."""

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(sincos_table(dim, grid))

    def forward(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Embeddings (1, height * width, dim) in the dtype of the table.

        Raises:
            ValueError: a grid other than that of training.
        """
        if grid != self.grid:
            raise ValueError(
                f"hidden_states must have {self.grid[0]} x {self.grid[1]} patches, whose positions are learned, "
                f"got {grid[0]} x {grid[1]}"
            )
        # Not the parameter itself, which an offloading hook moves away as soon as this returns.
        return self.table.view_as(self.table)


def position_table(pos_embed_type: str, dim: int, grid: tuple[int, int]) -> nn.Module:
    """`"sincos"` of rows and columns, `"sincos_1d"` of the number of a token, or `"learned"`.

    Raises:
        ValueError: another `pos_embed_type`.
    """
    if pos_embed_type == "learned":
        return LearnedPositions(dim, grid)
    axes = {"sincos": 2, "sincos_1d": 1}
    if pos_embed_type not in axes:
        raise ValueError(f"pos_embed_type must be 'sincos', 'sincos_1d' or 'learned', got {pos_embed_type!r}")
    return SinCosPositions(dim, grid, axes=axes[pos_embed_type])


def axial_angles(axes: list[tuple[torch.Tensor, int]], theta: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (N, head_dim / 2) in fp32 of rotary positions with several axes.

    A head consists of pairs of neighbouring channels; each axis rotates its own pairs.

    Args:
        axes: for each axis the positions (N,) of the tokens and the number of channels of a head that it rotates.
        theta: base of the frequencies: the slowest wavelength approaches 2 pi theta.
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
    """cos and sin (height * width, head_dim / 2) of 2-D rotary positions; the row rotates the first half."""
    return axial_angles([(positions, head_dim // 2) for positions in grid_positions(grid, device)], theta)


def unit_rotary_angles(
    head_dim: int, grid: tuple[int, int], device: torch.device, as_released: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of l-DeTok's 2-D rotary positions: coordinates in [0, 1] along each side, 7 to 7e-4 turns per side.

    As in `rotary_angles` the row rotates the first half of the pairs.

    Args:
        as_released: the reference code concatenates the angles of an axis with a copy of themselves and pairs
            neighbouring channels, whose angles then differ: it is no rotation, but its weights are trained with it.

    Returns:
        (height * width, head_dim / 2), one angle per pair; with `as_released` (height * width, head_dim), one per
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

    Initially they have the magnitudes of the axial ones, in two orthogonal directions that are random for each head.
    `frequencies` is (2, num_layers, heads, head_dim / 2), of rows and of columns.
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
    """Rotate pairs of neighbouring channels of queries or keys (batch, tokens, heads, head_dim), in fp32.

    Args:
        cos, sin: (tokens, head_dim / 2), one angle per pair; with axes for batch and heads where these differ:
            (batch or 1, tokens, heads or 1, head_dim / 2). With one angle per channel the last axis is head_dim.
    """
    if cos.ndim == 2:
        cos, sin = cos[None, :, None], sin[None, :, None]
    of_pairs = 2 * cos.shape[-1] == hidden_states.shape[-1]
    if of_pairs and not torch.compiler.is_compiling():
        # One complex product is three to six times as fast as the real form, but the compiler cannot fuse it.
        pairs = torch.view_as_complex(hidden_states.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(3).type_as(hidden_states)
    if of_pairs:
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    real, imaginary = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (hidden_states.float() * cos + turned.float() * sin).type_as(hidden_states)
