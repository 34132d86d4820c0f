"""DiffAugment: every kind by itself against its closed form, differentiable, and every image its own."""

import pytest
import torch

from hf_fae.losses.diffaugment import DiffAugment
from hf_fae.utils.randomness import ImageRandom


OFF = {"brightness": 0, "saturation": 0, "contrast": 0, "translation": 0, "cutout": 0}


def only(**strengths):
    return DiffAugment(**{**OFF, **strengths})


def images(batch_size=64, height=24, width=16):
    return torch.rand(batch_size, 3, height, width) * 2 - 1


def test_brightness_is_one_number_an_image_up_to_its_strength():
    x = images()
    added = (only(brightness=0.5)(x, ImageRandom(0, 0)) - x).flatten(1)
    torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=0, atol=1e-6)
    assert -0.5 <= added.min() < -0.4 and 0.4 < added.max() <= 0.5


def test_saturation_scales_the_distance_from_grey():
    x = images()
    y = only(saturation=1.0)(x, ImageRandom(0, 0))
    torch.testing.assert_close(y.mean(1), x.mean(1), rtol=0, atol=1e-6)
    scale = (y.std(dim=1) / x.std(dim=1)).flatten(1)
    torch.testing.assert_close(scale, scale[:, :1].expand_as(scale), rtol=0, atol=1e-3)
    assert 0 <= scale.min() < 0.2 and 1.8 < scale.max() <= 2.001


def test_contrast_scales_the_distance_from_the_mean():
    x = images()
    y = only(contrast=0.5)(x, ImageRandom(0, 0))
    torch.testing.assert_close(y.mean((1, 2, 3)), x.mean((1, 2, 3)), rtol=0, atol=1e-6)
    scale = y.std((1, 2, 3)) / x.std((1, 2, 3))
    expected = (x - x.mean((1, 2, 3), keepdim=True)) * scale.view(-1, 1, 1, 1) + x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    assert 0.5 <= scale.min() < 0.6 and 1.4 < scale.max() <= 1.5


def test_translation_moves_whole_pixels_and_fills_with_zeros():
    x = images(256)
    y = only(translation=0.125)(x, ImageRandom(0, 0))
    counts = {}
    for image, moved in zip(x, y):
        padded = torch.nn.functional.pad(image, (2, 2, 3, 3))
        matches = [
            (dy, dx)
            for dy in range(-3, 4)
            for dx in range(-2, 3)
            if torch.equal(padded[:, 3 - dy : 27 - dy, 2 - dx : 18 - dx], moved)
        ]
        assert len(matches) == 1
        counts[matches[0]] = counts.get(matches[0], 0) + 1
    assert len(counts) == 7 * 5 and max(counts.values()) < 25  # 7 of each on average


def test_cutout_is_a_square_of_zeros():
    y = only(cutout=0.25)(torch.ones(256, 3, 24, 16), ImageRandom(0, 0))
    assert torch.equal(y, y[:, :1].expand_as(y))
    for hole in y[:, 0] == 0:
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole.sum() == len(rows) * len(columns)  # a rectangle
        assert 3 <= len(rows) <= 6 and 2 <= len(columns) <= 4  # cut by the border by half at most
        assert (len(rows) == 6 or rows[0] == 0 or rows[-1] == 23) and rows[-1] - rows[0] == len(rows) - 1
        assert len(columns) == 4 or columns[0] == 0 or columns[-1] == 15


def test_all_off_changes_nothing():
    x = images()
    torch.testing.assert_close(only()(x, ImageRandom(0, 0)), x, rtol=0, atol=1e-6)


def test_gradients():
    x = images(2, 8, 8).double().requires_grad_()

    def augmented(x):
        return DiffAugment(cutout=0.25)(x, ImageRandom(0, 0))

    (gradient,) = torch.autograd.grad(augmented(x).sum(), x)
    # The map is affine: a step along a direction changes the sum by exactly the gradient.
    direction = torch.randn_like(x)
    change = augmented(x + direction).double().sum() - augmented(x).double().sum()
    torch.testing.assert_close(change, (gradient * direction).sum(), rtol=1e-4, atol=1e-3)
    assert gradient.abs().sum() > 0


def test_halves_of_a_batch_are_augmented_like_the_whole():
    x, augment = images(8), DiffAugment(cutout=0.2)
    halves = [augment(half, ImageRandom(5, first)) for half, first in zip(x.chunk(2), (0, 4))]
    assert torch.equal(augment(x, ImageRandom(5, 0)), torch.cat(halves))


def test_bad_strength():
    with pytest.raises(ValueError, match="translation must be from 0 to 1, got 8"):
        DiffAugment(translation=8)
