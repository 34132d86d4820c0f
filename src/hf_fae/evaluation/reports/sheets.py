"""Figures of patch similarity: similarity maps within images, and matches between images."""

import torch


__all__ = ["TITLES", "plot_matches", "plot_similarity"]

# Titles of `spaces.SPACES`.
TITLES = {"features": "encoder's features", "reconstruction": "reconstructed features", "latents": "latents"}
SIDE = 2.3  # inches per image and map
PAIR_SIDE = 3.0  # and per image of a pair


def plot_similarity(
    images: torch.Tensor,
    queries: list[int],
    maps: dict[str, torch.Tensor],
    cosines: torch.Tensor,
    grid: tuple[int, int],
    labels: list[str],
):
    """A row per image: the image with its query patch, similarity maps on one colour scale, and the cosine per token.

    Args:
        images: (B, 3, H, W) uint8.
        queries: the query patch of each image.
        maps: space -> cosines (B, N) with the query patch.
        cosines: (B, N), of reconstructed features with the features.
        grid: of the patches.
        labels: of the rows.

    Returns:
        A matplotlib `Figure`.
    """
    columns = len(maps) + 2
    figure, axes = _figure(len(images), columns, SIDE, SIDE)
    low = min(values.min().item() for values in maps.values())
    scales = {name: {"vmin": low, "vmax": 1, "cmap": "inferno"} for name in maps}
    heats = {TITLES[name]: (maps[name], scales[name]) for name in maps}
    heats["cosine per token"] = (cosines, {"vmin": cosines.min().item(), "vmax": 1, "cmap": "viridis"})
    for row, (image, query) in enumerate(zip(images, queries, strict=True)):
        pixels = image.permute(1, 2, 0).numpy()
        height, width = pixels.shape[:2]
        axes[row, 0].imshow(pixels)
        axes[row, 0].set_ylabel(labels[row], fontsize=9)
        for column, (values, style) in enumerate(heats.values(), start=1):
            axes[row, column].imshow(
                values[row].view(grid).numpy(), extent=(0, width, height, 0), interpolation="nearest", **style
            )
            _outline(axes[row, column], image, grid)
        for axis in axes[row, :-1]:
            _mark(axis, query, (height, width), grid)
    for part, label in ((axes[-1, 1:-1], "cosine with the query patch"), (axes[-1, -1:], "cosine")):
        bar = figure.colorbar(
            part[0].images[0], ax=part, location="bottom", shrink=0.6, aspect=12 * len(part), pad=0.04
        )
        bar.ax.tick_params(labelsize=8)
        bar.ax.locator_params(nbins=4 * len(part) - 1)
        bar.set_label(label, fontsize=9)
    for axis, title in zip(axes[0], ["query patch", *heats], strict=True):
        axis.set_title(title, fontsize=11)
    return figure


def plot_matches(
    images: torch.Tensor,
    masks: torch.Tensor,
    matches: list[dict[str, tuple[torch.Tensor, torch.Tensor]]],
    grid: tuple[int, int],
    labels: list[str],
):
    """A row per pair of images and a panel per space: patches of the left image and their matches in the right one.

    The background is faded. Matches that differ from those in the first space are dashed.

    Args:
        images: (B, 3, H, W) uint8; 2i and 2i + 1 are a pair.
        masks: (B, N) bool, object patches.
        matches: per pair, space -> patch indices (K, 2), and whether (K,) they match as in the first space, or next
            to that.
        grid: of the patches.
        labels: of the images.

    Returns:
        A matplotlib `Figure`.
    """
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke

    height, width = images.shape[2:]
    gap = width // 8
    figure, axes = _figure(len(matches), len(matches[0]), PAIR_SIDE * (2 + gap / width), PAIR_SIDE)
    pale = [_fade(image, mask, grid) for image, mask in zip(images, masks, strict=True)]
    for row, spaces in enumerate(matches):
        white = torch.full((3, height, gap), 255, dtype=torch.uint8)
        panel = torch.cat([pale[2 * row], white, pale[2 * row + 1]], dim=2)
        for column, (name, (pairs, is_alike)) in enumerate(spaces.items()):
            axis = axes[row, column]
            axis.imshow(panel.permute(1, 2, 0).numpy())
            order = pairs[:, 0].argsort().tolist()  # colours from top to bottom
            shifts = _spread(pairs[:, 1].tolist(), width / grid[1])
            for place, index in enumerate(order):
                colour = colormaps["turbo"](0.05 + 0.9 * place / max(1, len(order) - 1))
                left, right = (_centre(patch, (height, width), grid) for patch in pairs[index].tolist())
                right = (right[0] + width + gap + shifts[index], right[1])
                dashes = "-" if is_alike[index] else (0, (3, 2))
                axis.plot(*_arc(left, right), color=colour, linewidth=1.3, linestyle=dashes, alpha=0.9)
                axis.scatter(*zip(left, right), s=75, color=colour, edgecolors="black", linewidths=0.7, zorder=3)
                for point in (left, right):
                    text = axis.text(*point, place + 1, fontsize=6, color="white", ha="center", va="center_baseline")
                    text.set_path_effects([withStroke(linewidth=1.3, foreground="black")])
            axis.set(xlim=(0, 2 * width + gap), ylim=(height, -height / 8))
            count = f": {int(is_alike.sum())} of {len(order)} alike" if column else ""
            axis.set_title(TITLES[name] + count, fontsize=10)
        axes[row, 0].set_ylabel("\n".join(labels[2 * row : 2 * row + 2]), fontsize=8)
    return figure


def _figure(rows, columns, width, height):
    """A figure of framed axes without ticks: (figure, array of axes)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.4, (height + 0.3) * rows + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def _outline(axis, image, grid):
    """The image's edges over a heat map, for orientation."""
    grey = image.float().mean(0)
    axis.contour(grey.numpy(), levels=[128, 230], colors="white", linewidths=0.4, alpha=0.6)


def _mark(axis, patch, size, grid):
    """A frame around a patch that is visible on any background."""
    from matplotlib.patches import Rectangle

    height, width = size[0] / grid[0], size[1] / grid[1]
    corner = (patch % grid[1] * width, patch // grid[1] * height)
    for colour, thickness in (("black", 3.5), ("cyan", 1.8)):
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=thickness))


def _centre(patch, size, grid):
    return (patch % grid[1] + 0.5) * size[1] / grid[1], (patch // grid[1] + 0.5) * size[0] / grid[0]


def _spread(patches, width):
    """Offsets along x that separate points of the same patch."""
    places = [patches[:index].count(patch) for index, patch in enumerate(patches)]
    return [
        (place - (patches.count(patch) - 1) / 2) * width / max(3, patches.count(patch))
        for place, patch in zip(places, patches)
    ]


def _arc(start, end):
    """Points of an arc, higher the longer it is, so that lines of one row do not overlap."""
    t = torch.linspace(0, 1, 30)
    lift = 0.35 * (end[0] - start[0]) * t * (1 - t)
    return start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t - lift


def _fade(image, mask, grid):
    """An 8-bit image (3, H, W), faded outside of the mask (N,)."""
    from torch.nn.functional import interpolate

    inside = interpolate(mask.view(1, 1, *grid).float(), size=image.shape[1:], mode="nearest")[0]
    return (image * (0.3 + 0.7 * inside) + 255 * 0.7 * (1 - inside)).round().to(torch.uint8)
