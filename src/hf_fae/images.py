"""8-bit and PIL images from tensors, and labelled image grids."""

import bisect
import math
from pathlib import Path

import torch

from .utils.atomic import atomic_path


__all__ = ["from_uint8", "make_grid", "save_png", "to_pil", "to_uint8"]

MAX_LABEL = 500  # characters of a label that are measured; no image is wide enough for more


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] as 8-bit images, rounded; values outside are clamped."""
    return (images.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """8-bit images (..., 3, H, W) as fp32 images in [-1, 1]; `to_uint8` is its exact inverse."""
    return images.float() / 127.5 - 1


def to_pil(images: torch.Tensor) -> list:
    """Images (B, 3, H, W) in [-1, 1] as PIL images; values outside are clamped."""
    from PIL import Image

    pixels = to_uint8(images).cpu().permute(0, 2, 3, 1).contiguous()
    return [Image.fromarray(image) for image in pixels.numpy()]


def make_grid(
    images: list,
    columns: int | None = None,
    labels: list[str] | None = None,
    notes: list[str] | None = None,
    padding: int = 2,
):
    """A grid of images as one PIL image, row by row on white.

    Args:
        images: PIL images of one size.
        columns: images per row; by default the grid is about square. Rows of n originals and their n
            reconstructions are `make_grid(originals + reconstructions, columns=n)`.
        labels: a caption above each image, shortened to its width.
        notes: with labels, a short text right of each, which is never shortened.
        padding: pixels around each image.

    Raises:
        ValueError: no images, or another number of labels or notes.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not images:
        raise ValueError("images must hold at least one image, got none")
    for name, texts in (("labels", labels), ("notes", notes)):
        if texts is not None and len(texts) != len(images):
            raise ValueError(f"{name} must be as many as the {len(images)} images, got {len(texts)}")
    columns = columns or math.ceil(len(images) ** 0.5)
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    font = ImageFont.load_default(size=max(9, width // 11))
    header = 0 if labels is None else sum(font.getmetrics()) + padding
    cell_width, cell_height = width + 2 * padding, height + header + 2 * padding
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    canvas = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, top = column * cell_width + padding, row * cell_height + padding
        grid.paste(image, (left, top + header))
        if labels is not None:
            note = "" if notes is None else notes[index]
            room = width - math.ceil(font.getlength(f" {note} ")) if note else width
            canvas.text((left, top), _shorten(labels[index], font, room), fill="black", font=font)
            canvas.text((left + width, top), f"{note} ", fill="gray", font=font, anchor="ra")
    return grid


def _shorten(text, font, width):
    """`text` on one line, shortened with an ellipsis to `width` pixels."""
    text = " ".join(text[: 2 * MAX_LABEL].split())
    if len(text) <= MAX_LABEL and font.getlength(text) <= width:
        return text
    lengths = range(min(len(text), MAX_LABEL) + 1)
    fitting = bisect.bisect_right(lengths, width, key=lambda length: font.getlength(text[:length] + "…"))
    return text[: max(fitting - 1, 0)] + "…"


def save_png(image, path: Path) -> None:
    """Write a PIL image as PNG; a write that fails leaves an older file at `path` as it was."""
    with atomic_path(path) as part:
        image.save(part, format="PNG")
