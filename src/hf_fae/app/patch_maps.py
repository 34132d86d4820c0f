"""Heat maps of patch similarity, with the query patch framed."""

from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageOps

from ..evaluation.inputs.spaces import SPACES
from ..evaluation.metrics.patch_similarity import similarity_map


__all__ = ["SHOWN_SIDE", "Patches", "render_patches"]

SHOWN_SIDE = 448  # pixels of the image to click on, and of its heat maps
HEAT = {"black": "#000004", "mid": "#bc3754", "white": "#fcffa4"}  # matplotlib's inferno at 0, 1/2 and 1


@dataclass
class Patches:
    """An image to click on, enlarged to `SHOWN_SIDE`, and its tokens (N, C) in each of `SPACES` on a grid (h, w)."""

    image: Image.Image
    spaces: dict[str, torch.Tensor]
    grid: tuple[int, int]

    def patch_at(self, x: float, y: float) -> int:
        """The patch that contains a pixel of the enlarged image."""
        height, width = self.grid
        row, column = (min(int(place * cells / SHOWN_SIDE), cells - 1) for place, cells in ((y, height), (x, width)))
        return row * width + column


def render_patches(patches: Patches, query: int) -> tuple:
    """The image and, for each of `SPACES`, the cosines with the query patch as a heat map; all with the patch framed.

    The maps share one colour scale, which the last value states in words.
    """
    maps = {space: similarity_map(patches.spaces[space], query) for space in SPACES}
    low = min(values.min().item() for values in maps.values())
    images = [patches.image.copy()]
    for values in maps.values():
        shades = (255 * (values - low) / max(1 - low, 1e-6)).clamp(0, 255).round().to(torch.uint8)
        heat = ImageOps.colorize(Image.fromarray(shades.view(patches.grid).numpy()), **HEAT)
        images.append(heat.resize(patches.image.size, Image.Resampling.NEAREST))
    for image in images:
        _frame(image, query, patches.grid)
    row, column = divmod(query, patches.grid[1])
    return *images, f"Cosine with the patch in row {row + 1}, column {column + 1}: black is {low:.2f}, yellow is 1."


def _frame(image, patch, grid):
    """A frame around a patch that is visible on any background."""
    row, column = divmod(patch, grid[1])
    height, width = image.height / grid[0], image.width / grid[1]
    box = [column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1]
    canvas = ImageDraw.Draw(image)
    canvas.rectangle([box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2], outline="black", width=6)
    canvas.rectangle(box, outline="cyan", width=3)
