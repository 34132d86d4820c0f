import math

import pytest
import torch

from hf_fae.layers.positions import SinCosPositions, apply_rotary, rotary_angles


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


def test_eager_and_compiled_rotation_agree():
    cos, sin = rotary_angles(16, (4, 4), CPU)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 16, 3, 16, dtype=dtype)
        compiled = torch.compile(apply_rotary, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, cos, sin), apply_rotary(x, cos, sin))
