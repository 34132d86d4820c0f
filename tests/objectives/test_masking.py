"""Laws of masked shares and the patches they hide: section 1 of the specifications of l-DeTok and MAETok."""

import pytest
import torch
from torch.distributions import Normal

from hf_fae.objectives.detok import select_visible_patches
from hf_fae.objectives.maetok import select_patch_mask
from hf_fae.objectives.masking import truncated_normal_mask_ratio


GRID = (torch.arange(100_000) + 0.5) / 100_000  # uniform numbers without chance: means over them are integrals


def test_truncated_normal_law():
    ratios = truncated_normal_mask_ratio(GRID)
    assert ratios.mean().item() == pytest.approx(0.5052, abs=1e-4)
    assert 0.4 <= ratios.min() and ratios.max() <= 0.6
    low, high = ((ratios >= edge) & (ratios < edge + 0.002) for edge in (0.4, 0.598))
    assert (low.sum() / high.sum()).item() == pytest.approx(0.726, abs=0.01)  # densities at both ends
    counts = torch.histc(ratios, 10, 0.4, 0.6) / len(GRID)
    edges = Normal(0.6, 0.25).cdf(torch.linspace(0.4, 0.6, 11))
    torch.testing.assert_close(counts, edges.diff() / (edges[-1] - edges[0]), atol=2e-4, rtol=0)


def test_a_wide_law_is_uniform():
    ratios = truncated_normal_mask_ratio(GRID, std=1e4)
    torch.testing.assert_close(ratios, 0.4 + 0.2 * GRID, atol=1e-5, rtol=0)


def test_law_of_mar():
    ratios = truncated_normal_mask_ratio(GRID, 0.7, 1.0, center=1.0)
    assert ratios.mean().item() == pytest.approx(0.867, abs=1e-3)


@pytest.mark.parametrize("ratio, count", [(0.0, 256), (0.5, 128), (0.7, 77), (0.69999, 77), (0.6, 103)])
def test_kept_tokens(ratio, count):
    """ceil(256 (1 - m))."""
    scores = torch.rand(3, 256)
    visible, mask = select_visible_patches(scores, ratio), select_patch_mask(scores, ratio)
    assert visible.shape == (3, count) and (~mask).sum(1).tolist() == [count] * 3
    for image in range(3):
        assert visible[image].tolist() == (~mask[image]).nonzero().flatten().tolist()  # once each, in raster order
        assert scores[image][~mask[image]].max() < scores[image][mask[image]].min() if ratio else True


def test_rounding_does_not_add_a_token():
    assert select_visible_patches(torch.rand(1, 10), 0.7).shape == (1, 3)
    assert (~select_patch_mask(torch.rand(1, 10), torch.tensor([0.7]))).sum() == 3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda u: truncated_normal_mask_ratio(u, 0.6, 0.4), "min_ratio and max_ratio must rise .* got 0.6 and 0.4"),
        (lambda u: truncated_normal_mask_ratio(u, std=0.0), "std must be positive and finite, got 0.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(2, 4))
