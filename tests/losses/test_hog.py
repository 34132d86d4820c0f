"""HOG against a loop over pixels in numpy, and against scikit-image."""

import math

import numpy as np
import pytest
import torch
from skimage.feature import hog

from hf_fae.losses.hog import hog_features


@pytest.fixture(scope="module")
def images():
    noise = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    return noise * 2 - 1


def histograms(plane):
    """(h / 8, w / 8, 9) of one colour plane (h, w)."""
    height, width = plane.shape
    found = np.zeros((height // 8, width // 8, 9))
    for y in range(height):
        for x in range(width):
            down = plane[y + 1, x] - plane[y - 1, x] if 0 < y < height - 1 else 0.0
            right = plane[y, x + 1] - plane[y, x - 1] if 0 < x < width - 1 else 0.0
            degrees = math.degrees(math.atan2(down, right)) % 180
            found[y // 8, x // 8, min(int(degrees // 20), 8)] += math.hypot(down, right)
    return found / np.linalg.norm(found, axis=-1, keepdims=True).clip(1e-12)


def by_cells(features, rows, columns):
    """(B, 3, 2 * rows, 2 * columns, 9) of what `hog_features` gives for patches of 16 pixels."""
    patches = features.unflatten(1, (rows, columns)).unflatten(3, (3, 9, 2, 2))
    return patches.permute(0, 3, 1, 5, 2, 6, 4).flatten(2, 3).flatten(3, 4)


def test_equals_a_loop_over_pixels(images):
    features = hog_features(images)
    assert features.shape == (2, 2, 108) and features.dtype == torch.float32
    cells = by_cells(features, 1, 2)
    for image in range(2):
        for colour in range(3):
            expected = torch.from_numpy(histograms(images[image, colour].double().numpy())).float()
            torch.testing.assert_close(cells[image, colour], expected, atol=1e-4, rtol=1e-3)


def test_equals_scikit_image(images):
    cells = by_cells(hog_features(images), 1, 2)
    for image in range(2):
        for colour in range(3):
            expected = hog(
                images[image, colour].double().numpy() / 2,
                pixels_per_cell=(8, 8),
                cells_per_block=(1, 1),
                block_norm="L2",
                feature_vector=False,
            )
            found = cells[image, colour].double().numpy()
            np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-3)


@pytest.mark.parametrize("angle", [10.0, 50.0, 90.0, 130.0, 170.0, 190.0])
def test_a_ramp_has_one_orientation(angle):
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    radians = math.radians(angle)
    ramp = (x * math.cos(radians) + y * math.sin(radians)) / 64
    cells = by_cells(hog_features(ramp.expand(1, 3, 32, 32)), 2, 2)[:, :, 1:3, 1:3]  # away from the border
    assert cells.argmax(-1).unique().tolist() == [int(angle % 180 // 20)]
    torch.testing.assert_close(cells.max(-1).values, torch.ones(1, 3, 2, 2))


def test_cells_have_unit_length_or_none(images):
    cells = by_cells(hog_features(images), 1, 2)
    torch.testing.assert_close(cells.norm(dim=-1), torch.ones(2, 3, 2, 4))
    assert not hog_features(torch.full((1, 3, 16, 16), 0.3)).any()


def test_contrast_does_not_matter(images):
    torch.testing.assert_close(hog_features(images), hog_features(-0.5 * images), atol=1e-4, rtol=1e-4)


def test_sizes():
    assert hog_features(torch.rand(1, 3, 256, 256)).shape == (1, 256, 108)
    assert hog_features(torch.rand(1, 3, 32, 32), patch_size=8).shape == (1, 16, 27)
    with pytest.raises(ValueError, match="patch_size must be a positive multiple of 8, got 12"):
        hog_features(torch.rand(1, 3, 24, 24), patch_size=12)
    with pytest.raises(ValueError, match="images must have sides that are multiples of 16, got 24 x 32"):
        hog_features(torch.rand(1, 3, 24, 32))
