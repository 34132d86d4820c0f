"""The numbers of a block of STARFlow, by section 1 of specs/starflow.md, and its positions."""

import pytest
import torch

from hf_fae.generators.starflow_block import UNIT_SCALE, STARFlowBlock, sequence_angles, soft_clip


@pytest.mark.parametrize(("value", "expected"), [(4.0, 3.0464), (10.0, 3.9465), (0.0, 0.0), (-4.0, -3.0464)])
def test_soft_clip(value, expected):
    assert soft_clip(torch.tensor(value)).item() == pytest.approx(expected, abs=5e-5)


def test_unit_scale():
    assert UNIT_SCALE == pytest.approx(0.541324854612918, abs=1e-15)
    assert torch.nn.functional.softplus(torch.tensor(UNIT_SCALE)).item() == pytest.approx(1, abs=1e-7)


def test_channels_of_another_head():
    """16 turn with the caption in any head."""
    cos, sin = sequence_angles(24, (2, 2), 2.0, torch.arange(3.0))
    turned = torch.atan2(sin, cos).ne(0).any(0).tolist()
    assert len(turned) == 12 and turned == [True] * 12
    assert not torch.atan2(sin, cos)[3:, 4:].any()


def test_fresh_block_predicts_the_standard_normal():
    block, tokens = STARFlowBlock(6, 48, num_layers=2, heads=2), torch.randn(2, 4, 6)
    mean, scale = block(tokens, sequence_angles(24, (1, 5), 2.0, torch.zeros(0)))
    assert mean.shape == scale.shape == (2, 5, 6)
    assert not mean.any()
    torch.testing.assert_close(scale, torch.ones_like(scale))


def test_grids_are_as_large_as_that_of_training():
    """Positions of the same relative place agree: those of a grid of twice the side are half as far apart."""
    small, large = (sequence_angles(64, (side, side), 4.0, torch.zeros(0)) for side in (4, 8))
    for one, other in zip(small, large, strict=True):
        torch.testing.assert_close(one.view(4, 4, -1), other.view(8, 8, -1)[::2, ::2])
