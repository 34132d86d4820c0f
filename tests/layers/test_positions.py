import math

import pytest
import torch

from hf_fae.layers.positions import LearnedRotary, SinCosPositions, apply_rotary, rotary_angles, unit_rotary_angles


CPU = torch.device("cpu")


def test_sincos_table_closed_form():
    table = SinCosPositions(8, (2, 3))((2, 3), CPU)[0].view(2, 3, 8)
    for row in range(2):
        for column in range(3):
            expected = [f(position * w) for position in (column, row) for f in (math.sin, math.cos) for w in (1, 0.01)]
            torch.testing.assert_close(table[row, column], torch.tensor(expected))


def test_other_grids_are_computed():
    positions = SinCosPositions(8, (2, 3))
    assert torch.equal(positions((4, 5), CPU), SinCosPositions(8, (4, 5)).table)
    assert torch.equal(positions((1, 128), CPU), SinCosPositions(8, (1, 128)).table)


@pytest.mark.parametrize("head_dim", [8, 16, 72])
def test_rotation_keeps_lengths_and_depends_on_differences_only(head_dim):
    cos, sin = rotary_angles(head_dim, (6, 7), CPU)
    query, key = torch.randn(2, head_dim)
    turned_q = apply_rotary(query.expand(1, 42, 1, head_dim), cos, sin)[0, :, 0].view(6, 7, head_dim)
    turned_k = apply_rotary(key.expand(1, 42, 1, head_dim), cos, sin)[0, :, 0].view(6, 7, head_dim)
    torch.testing.assert_close(turned_q.norm(dim=-1), query.norm().expand(6, 7))
    torch.testing.assert_close(turned_q[0, 0], query)
    reference = turned_q[1, 2] @ turned_k[3, 5]
    torch.testing.assert_close(turned_q[2, 3] @ turned_k[4, 6], reference, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(turned_q[1, 2] @ turned_k[3, 4], reference, atol=1e-4)
    assert not torch.allclose(turned_q[1, 2] @ turned_k[4, 5], reference, atol=1e-4)


def test_rotation_equals_explicit_matrices():
    cos, sin = rotary_angles(8, (3, 4), CPU)
    x = torch.randn(1, 12, 1, 8)
    turned = apply_rotary(x, cos, sin)
    for token in range(12):
        row, column = divmod(token, 4)
        for pair, angle in enumerate([row * 1.0, row * 0.01, column * 1.0, column * 0.01]):
            matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            expected = matrix @ x[0, token, 0, 2 * pair : 2 * pair + 2]
            torch.testing.assert_close(turned[0, token, 0, 2 * pair : 2 * pair + 2], expected)


def all_angles():
    """For a grid of 4 x 4 and heads of width 16: of pairs, of channels, of pairs of each head."""
    learned = LearnedRotary(1, 3, 16, 10.0)((4, 4))
    return [
        rotary_angles(16, (4, 4), CPU),
        unit_rotary_angles(16, (4, 4), CPU, as_released=True),
        [values[0].detach() for values in learned],
    ]


@pytest.mark.parametrize("angles", range(3))
def test_eager_and_compiled_rotation_agree(angles):
    cos, sin = all_angles()[angles]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 16, 3, 16, dtype=dtype)
        torch._dynamo.reset()
        compiled = torch.compile(apply_rotary, backend="aot_eager", fullgraph=True)
        assert apply_rotary(x, cos, sin).dtype == dtype
        torch.testing.assert_close(compiled(x, cos, sin), apply_rotary(x, cos, sin))


def test_images_may_have_tokens_at_different_places():
    cos, sin = rotary_angles(16, (4, 4), CPU)
    x, places = torch.randn(2, 5, 3, 16), torch.tensor([[0, 3, 7, 9, 15], [8, 1, 2, 5, 4]])
    turned = apply_rotary(x, cos[places][:, :, None], sin[places][:, :, None])
    for image in range(2):
        whole = torch.zeros(1, 16, 3, 16)
        whole[0, places[image]] = x[image]
        torch.testing.assert_close(turned[image], apply_rotary(whole, cos, sin)[0, places[image]])


def test_base_of_the_frequencies():
    cos, _ = rotary_angles(8, (2, 2), CPU, theta=100.0)
    torch.testing.assert_close(cos[3], torch.tensor([1.0, 0.1, 1.0, 0.1]).cos())  # row 1, column 1


class TestUnitRotary:
    """Section 2 of l-DeTok's specification, for heads of width 64."""

    def test_frequencies(self):
        cos, sin = unit_rotary_angles(64, (16, 16), CPU)
        assert cos.shape == sin.shape == (256, 32)
        turns = torch.tensor([7 * 10 ** (-4 * k / 15) for k in range(16)])
        for place in (0, 1, 16, 255):
            row, column = divmod(place, 16)
            angles = 2 * math.pi * torch.cat([row / 15 * turns, column / 15 * turns])
            torch.testing.assert_close(cos[place], angles.cos(), atol=1e-4, rtol=0)
            torch.testing.assert_close(sin[place], angles.sin(), atol=1e-4, rtol=0)

    def test_as_released_each_half_lists_its_angles_twice(self):
        (cos, sin), (cos_released, sin_released) = (unit_rotary_angles(64, (16, 16), CPU, kind) for kind in (0, 1))
        for angles, released in ((cos, cos_released), (sin, sin_released)):
            rows, columns = angles.chunk(2, dim=-1)
            assert torch.equal(released, torch.cat([rows, rows, columns, columns], dim=-1))

    def test_only_ours_keeps_lengths(self):
        x = torch.randn(1, 256, 1, 64)
        ours, released = (apply_rotary(x, *unit_rotary_angles(64, (16, 16), CPU, kind)) for kind in (False, True))
        torch.testing.assert_close(ours.norm(dim=-1), x.norm(dim=-1))
        assert not torch.allclose(released.norm(dim=-1), x.norm(dim=-1), rtol=0.05)
        cos, sin = unit_rotary_angles(64, (16, 16), CPU, as_released=True)
        first = x[..., 0] * cos[:, 0, None] - x[..., 1] * sin[:, 0, None]
        second = x[..., 1] * cos[:, 1, None] + x[..., 0] * sin[:, 1, None]
        torch.testing.assert_close(released[..., :2], torch.stack([first, second], dim=-1))


class TestLearnedRotary:
    def test_at_first_the_axial_frequencies_in_two_directions_at_right_angles(self):
        rotary = LearnedRotary(num_layers=2, heads=3, head_dim=16, theta=10.0)
        first, second = rotary.frequencies.detach().chunk(2, dim=-1)  # (rows and columns, layers, heads, 4)
        magnitudes = 10.0 ** -(torch.arange(4) / 4)
        for half in (first, second):
            torch.testing.assert_close(half.norm(dim=0), magnitudes.expand(2, 3, 4))
        torch.testing.assert_close((first * second).sum(0), torch.zeros(2, 3, 4), atol=1e-6, rtol=0)
        assert first[0, :, :, 0].unique().numel() == 6  # each head has its own

    def test_axial_ones_are_a_special_case(self):
        rotary = LearnedRotary(num_layers=2, heads=3, head_dim=16, theta=10.0)
        magnitudes, zeros = 10.0 ** -(torch.arange(4) / 4), torch.zeros(4)
        directions = torch.stack([torch.cat([magnitudes, zeros]), torch.cat([zeros, magnitudes])])
        rotary.frequencies.data = directions[:, None, None].expand(2, 2, 3, 8).clone()
        for values, axial in zip(rotary((4, 5)), rotary_angles(16, (4, 5), CPU, theta=10.0), strict=True):
            assert values.shape == (2, 1, 20, 3, 8)
            torch.testing.assert_close(values, axial[None, None, :, None].expand_as(values))
