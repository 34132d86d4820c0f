import numpy as np
import pytest
import torch

from hf_fae import FlowGuidance, Guidance, TokenGuidance


THREE_PART = Guidance(((0.9, 1.0, 0.9), (0.0, 0.7, 2.5)))


@pytest.mark.parametrize(
    "t, scale", [(1.0, 0.9), (0.91, 0.9), (0.9, 1.0), (0.8, 1.0), (0.71, 1.0), (0.7, 2.5), (0.3, 2.5), (0.0, 2.5)]
)
def test_three_part_schedule(t, scale):
    """Scale 0.9 for t in (0.9, 1], 1 for (0.7, 0.9], 2.5 for [0, 0.7] (fae spec, section 1)."""
    assert THREE_PART.scale_at(t) == scale


@pytest.mark.parametrize("end", [0.9, 0.75, 0.7, 0.65])
def test_the_noisy_end_is_not_guided(end):
    """l-DeTok's LightningDiT: off for t > 0.9; MAETok's intervals from 0 (section 1 of both specifications)."""
    guidance = Guidance(((0.0, end, 1.8),))
    assert [guidance.scale_at(t) for t in (0.0, 0.5, end)] == [1.8] * 3
    assert [guidance.scale_at(t) for t in (end + 1e-3, 1.0)] == [1.0] * 2


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


def flow(weight, mean, scale, negative_mean, negative_scale, rule="starflow"):
    values = (torch.tensor(value, dtype=torch.float64) for value in (mean, scale, negative_mean, negative_scale))
    return tuple(value.item() for value in FlowGuidance(weight, rule).combine(*values))


@pytest.mark.parametrize(
    ("weight", "conditional", "unconditional", "expected"),
    [
        (3.0, (1.0, 0.5), (0.0, 1.0), (1.230769, 0.277350)),
        (3.0, (1.0, 1.0), (0.0, 0.5), (4.0, 1.0)),  # the ratio of the scales is clipped to 1
        (3.6, (1.0, 0.8), (0.0, 1.0), (2.003484, 0.527964)),
        (2.0, (1.0, 0.7), (0.5, 0.7), (1.0 + 2.0 * 0.5, 0.7)),  # equal scales: the ordinary rule
    ],
)
def test_flow_guidance_of_the_specification(weight, conditional, unconditional, expected):
    """specs/starflow.md, section 1."""
    assert flow(weight, *conditional, *unconditional) == pytest.approx(expected, abs=1e-6)


def random_flow(count=1000):
    return torch.randn(count), torch.rand(count) * 3 + 0.01, torch.randn(count), torch.rand(count) * 3 + 0.01


def test_flow_guidance_of_weight_0_changes_nothing():
    mean, scale, *negative = random_flow()
    for rule in ("starflow", "tarflow"):
        guided = FlowGuidance(0.0, rule).combine(mean, scale, *negative)
        assert torch.equal(guided[0], mean) and torch.equal(guided[1], scale)
    assert not FlowGuidance(0.0).is_active and FlowGuidance(-0.5).is_active


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.3, 1.0, 3.0, 3.7, 20.0, 1e4])
def test_guided_scale_never_exceeds_the_conditional_one(weight):
    mean, scale, *negative = random_flow()
    _, guided = FlowGuidance(weight).combine(mean, scale, *negative)
    assert (guided > 0).all() and (guided <= scale).all()


def test_other_end_is_the_unconditional_model():
    """Scale 0, w = -1, as for denoisers; where it is wider than the conditional one."""
    mean, scale, negative_mean, _ = random_flow()
    guided = FlowGuidance.of(0.0).combine(mean, scale, negative_mean, 2 * scale)
    torch.testing.assert_close(guided, (negative_mean, 2 * scale), atol=1e-5, rtol=1e-5)


def test_the_older_rule_extrapolates_and_narrows_or_widens_without_bound():
    assert flow(3.0, 1.0, 0.5, 0.0, 1.0, "tarflow") == pytest.approx((4.0, 0.5**4))
    assert flow(3.0, 1.0, 1.0, 0.0, 0.5, "tarflow") == pytest.approx((4.0, 2.0**3))


def test_a_scale_is_one_more_than_the_weight():
    assert FlowGuidance.of(4.0) == FlowGuidance(3.0) == FlowGuidance.of({"weight": 3.0, "rule": "starflow"})
    assert FlowGuidance.of(np.float32(1.0)) == FlowGuidance() and FlowGuidance.of(FlowGuidance(2.0)).weight == 2.0


@pytest.mark.parametrize(
    "value, message",
    [
        (-0.5, "guidance_scale must be a finite number from 0, .* got -0.5"),
        (float("inf"), "guidance_scale must be a finite number from 0, .* got inf"),
        (float("nan"), "got nan"),
        ([(0.0, 1.0, 2.0)], r"guidance_scale must be .* got \[\(0.0, 1.0, 2.0\)\]"),
        (True, "got True"),
        ({"scale": 2.0}, "got {'scale': 2.0}"),
        ({"weight": -2.0}, "guidance weight w must be finite and at least -1, got -2.0"),
        ({"weight": "3"}, "guidance weight w must be finite and at least -1, got '3'"),
        ({"rule": "newest"}, "guidance rule must be 'starflow' or 'tarflow', got 'newest'"),
    ],
)
def test_bad_flow_guidance(value, message):
    with pytest.raises(ValueError, match=message):
        FlowGuidance.of(value)


class TestTokenGuidance:
    """Section 1 of the l-DeTok specification."""

    def test_linear(self):
        guidance = TokenGuidance(3.9)
        assert guidance.scale_at(0.0) == 1
        assert guidance.scale_at(0.5) == pytest.approx(2.45)
        assert 1 < guidance.scale_at(255 / 256) < 3.9
        assert TokenGuidance(0.0).scale_at(0.25) == pytest.approx(0.75)

    def test_constant(self):
        assert {TokenGuidance(3.0, "constant").scale_at(known) for known in (0.0, 0.3, 0.9)} == {3.0}

    def test_activity(self):
        assert not TokenGuidance().is_active and TokenGuidance(0.5).is_active and TokenGuidance(0).is_active

    def test_combination(self):
        one, other = torch.randn(2, 3, 4)
        torch.testing.assert_close(TokenGuidance(3.0).combine(one, other, 2.5), other + 2.5 * (one - other))

    def test_forms(self):
        given = TokenGuidance(3.0)
        assert TokenGuidance.of(3.0) == given == TokenGuidance.of({"scale": 3.0}) and TokenGuidance.of(given) is given

    @pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "strong", None, [3.0], {"weight": 2}])
    def test_bad_scale(self, value):
        with pytest.raises(ValueError, match="guidance_scale must be a finite number from 0, or a TokenGuidance, got"):
            TokenGuidance.of(value)
