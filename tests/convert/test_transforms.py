import pytest
import torch
from diffusers.models.embeddings import Timesteps

from hf_fae.convert.transforms import (
    ADD_ONE,
    APPEND_ROW,
    NEGATE,
    REVERSE_TIME,
    SPLIT_QKV,
    SWAP_HALVES,
    TRANSPOSE,
    chain,
    each_half,
    first_rows,
    fold_first_position,
    inverse,
    pixel_columns,
    pixel_rows,
    squeeze,
)


@pytest.mark.parametrize(
    "transform, shape",
    [
        (NEGATE, (4, 3)),
        (TRANSPOSE, (4, 3)),
        (SPLIT_QKV, (12, 3)),
        (SWAP_HALVES, (6,)),
        (squeeze(0), (1, 5, 3)),
        (squeeze(-1, -2), (5, 3, 1, 1)),
        (squeeze(0, 1), (1, 1, 3)),
        (pixel_rows(2, 3), (12, 5)),
        (pixel_rows(2, 3), (12,)),
        (pixel_columns(2, 3), (5, 12)),
        (each_half(pixel_rows(2, 3)), (24, 5)),
        (each_half(NEGATE), (4,)),
        (chain(pixel_rows(2, 3), NEGATE), (12,)),
        (inverse(squeeze(-1, -2)), (5, 3)),
        (inverse(pixel_rows(2, 3)), (12, 5)),
    ],
)
def test_round_trip(transform, shape):
    tensor = torch.randn(shape)
    made = transform.to_ours(tensor)
    assert torch.equal(transform.to_published(*made if isinstance(made, tuple) else (made,)), tensor)


def test_pixel_rows_order():
    rows = torch.tensor([[p1, p2, channel] for p1 in range(2) for p2 in range(2) for channel in range(3)])
    expected = torch.tensor([[p1, p2, channel] for channel in range(3) for p1 in range(2) for p2 in range(2)])
    assert torch.equal(pixel_rows(2, 3).to_ours(rows), expected)


def test_pixel_columns_are_the_rows_of_the_transpose():
    weight = torch.randn(5, 12)
    assert torch.equal(pixel_columns(2, 3).to_ours(weight), pixel_rows(2, 3).to_ours(weight.T).T)


def test_halves_are_transformed_each_by_itself():
    values = torch.arange(8.0)
    assert each_half(SWAP_HALVES).to_ours(values).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]


def test_gain_as_a_distance_from_one():
    gain = torch.rand(100) + 0.5
    assert torch.equal(ADD_ONE.to_ours(ADD_ONE.to_published(gain)), gain)
    small = torch.tensor([2.0**-10], dtype=torch.bfloat16)  # 1 + 2^-10 rounds to 1 in bf16
    assert ADD_ONE.to_ours(small).item() == 1 + 2**-10


def test_reverse_time():
    """The reversed map sees noise time t as the published one sees data time 1 - t."""
    sinusoids = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    weight, t = torch.randn(7, 256), torch.rand(5)
    ours = sinusoids(t) @ REVERSE_TIME.to_ours(weight).T
    torch.testing.assert_close(ours, sinusoids(1 - t) @ weight.T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(REVERSE_TIME.to_published(REVERSE_TIME.to_ours(weight)), weight, atol=1e-6, rtol=1e-6)


def test_first_rows():
    """What is dropped comes back as zeros."""
    transform, tensor = first_rows(2, 5), torch.randn(5, 3)
    assert torch.equal(transform.to_ours(tensor), tensor[:2])
    expected = torch.cat([tensor[:2], torch.zeros(3, 3)])
    assert torch.equal(transform.to_published(tensor[:2]), expected)
    with pytest.raises(ValueError, match=r"tensor must have 5 rows, got shape \(4, 3\)"):
        transform.to_ours(torch.ones(4, 3))


def test_inverse_of_squeeze_adds_axes():
    assert inverse(squeeze(-1, -2)).to_ours(torch.ones(5, 3)).shape == (5, 3, 1, 1)


@pytest.mark.parametrize("ndim", [1, 2])
def test_fold_first_position(ndim):
    fold, token, positions = fold_first_position(ndim), torch.randn(1, 1, 3), torch.randn(1, 5, 3)
    ours = fold.to_ours(token, positions)
    assert ours[0].ndim == ndim and torch.equal(ours[0].view(3), token[0, 0] + positions[0, 0])
    assert torch.equal(ours[1], positions[0, 1:])
    back = fold.to_published(*ours)
    assert [tensor.shape for tensor in back] == [token.shape, positions.shape] and not back[1][:, 0].any()
    assert all(torch.equal(one, other) for one, other in zip(fold.to_ours(*back), ours, strict=True))


def test_append_row():
    table, row = torch.randn(4, 3), torch.randn(1, 3)
    ours = APPEND_ROW.to_ours(table, row)
    assert torch.equal(ours[-1:], row)
    assert all(torch.equal(one, other) for one, other in zip(APPEND_ROW.to_published(ours), (table, row), strict=True))


def test_squeeze_refuses_longer_axes():
    with pytest.raises(ValueError, match=r"axes \(0,\) must be of length 1, got shape \(2, 3\)"):
        squeeze(0).to_ours(torch.ones(2, 3))
