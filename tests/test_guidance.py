import numpy as np
import pytest
import torch

from hf_fae import Guidance


THREE_PART = Guidance(((0.9, 1.0, 0.9), (0.0, 0.7, 2.5)))


@pytest.mark.parametrize(
    "t, scale", [(1.0, 0.9), (0.91, 0.9), (0.9, 1.0), (0.8, 1.0), (0.71, 1.0), (0.7, 2.5), (0.3, 2.5), (0.0, 2.5)]
)
def test_three_part_schedule(t, scale):
    """Scale 0.9 for t in (0.9, 1], 1 for (0.7, 0.9], 2.5 for [0, 0.7] (fae spec, section 1)."""
    assert THREE_PART.scale_at(t) == scale


def test_constant_scale_covers_all_times():
    assert [Guidance.of(2.0).scale_at(t) for t in (0.0, 0.5, 1.0)] == [2.0] * 3
    assert Guidance.of(2.0).is_active and not Guidance.of(1.0).is_active and not Guidance.of(1).is_active


def test_forms_are_equivalent():
    intervals = [(0.9, 1.0, 0.9), (0.0, 0.7, 2.5)]
    for form in (intervals, [list(i) for i in intervals], {"intervals": intervals, "channels": None}, THREE_PART):
        assert Guidance.of(form) == THREE_PART


def test_numbers_of_numpy():
    assert Guidance.of(np.float32(2.5)) == Guidance.of(2.5)


def test_combination():
    conditional, unconditional = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    guidance = Guidance.of(2.5)
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(guidance.combine(conditional, unconditional, 2.5), expected)
    assert torch.equal(guidance.combine(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guidance.combine(conditional, unconditional, 0.0), unconditional)


def test_first_three_channels_only():
    conditional, unconditional = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    guided = Guidance(((0, 1, 2.0),), channels=3).combine(conditional, unconditional, 2.0)
    torch.testing.assert_close(guided[:, :3], (2 * conditional - unconditional)[:, :3])
    assert torch.equal(guided[:, 3:], conditional[:, 3:])


@pytest.mark.parametrize(
    "value, message",
    [
        ([(0.5, 0.2, 2.0)], r"t_low < t_high <= 1, got \(0.5, 0.2, 2.0\)"),
        ([(0.5, 1.2, 2.0)], r"got \(0.5, 1.2, 2.0\)"),
        ([(0.0, 0.6, 2.0), (0.5, 1.0, 1.5)], "must not overlap"),
        (float("nan"), "must be finite, got nan"),
        ([(0.0, 1.0)], "t_low, t_high, scale"),
        (None, "must be a number or a list .* got None"),
        ({"scale": 2.0}, "must be a number or a list .* got {'scale': 2.0}"),
        ({"intervals": [(0, 1, 2.0)], "channels": 0}, "channels must be positive or None, got 0"),
        (True, "must be a number or a list .* got True"),
    ],
)
def test_bad_values(value, message):
    with pytest.raises(ValueError, match=message):
        Guidance.of(value)
