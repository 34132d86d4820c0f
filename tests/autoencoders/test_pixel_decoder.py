import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_fae.autoencoders.pixel_decoder import LinearHead, OverlapHead


def randomized(head):
    nn.init.normal_(head.weight)
    nn.init.normal_(head.bias)
    return head.double()


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 2)])
def test_overlap_head_blends_windows(grid):
    """Equals torch's `fold` of windows under a Hann window, divided by the sum of the weights."""
    size, (rows, columns) = 4, grid
    head = randomized(OverlapHead(5, size))
    tokens = torch.randn(2, rows * columns, 5, dtype=torch.float64)
    windows = F.linear(tokens, head.weight, head.bias).transpose(1, 2)
    centers = (torch.arange(2 * size, dtype=torch.float64) + 0.5) / (2 * size)
    hann = torch.sin(torch.pi * centers).square()
    weights = torch.outer(hann, hann).flatten().repeat(3)[None, :, None].expand_as(windows)
    fold = {"output_size": ((rows + 1) * size, (columns + 1) * size), "kernel_size": 2 * size, "stride": size}
    image = F.fold(windows * weights, **fold) / F.fold(weights, **fold)
    half = size // 2
    torch.testing.assert_close(head(tokens, grid), image[:, :, half:-half, half:-half], atol=1e-6, rtol=1e-5)


def test_overlap_head_continues_a_linear_head():
    """Constant patches stay constant; in the middle of the image nothing of a patch's own prediction is lost."""
    linear = randomized(LinearHead(5, 4))
    head = OverlapHead.from_linear(linear)
    token = torch.randn(1, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(head(token, (1, 1)), linear(token, (1, 1)))
    with torch.no_grad():
        for value in (linear.weight, linear.bias):  # patches of one colour each
            value.copy_(value.unflatten(0, (3, 16))[:, :1].expand(-1, 16, *value.shape[1:]).flatten(0, 1))
    head, same = OverlapHead.from_linear(linear), token.expand(1, 9, 5)
    torch.testing.assert_close(head(same, (3, 3)), linear(same, (3, 3)), atol=1e-5, rtol=1e-5)


def test_overlap_head_has_no_seams():
    """Across the borders of patches of random tokens the image jumps no more than elsewhere."""
    head, linear = randomized(OverlapHead(16, 8)), randomized(LinearHead(16, 8))
    for smooth in (head, linear):  # windows without detail, so that only their borders could show
        size = 16 if smooth is head else 8
        with torch.no_grad():
            smooth.weight.copy_(
                smooth.weight.unflatten(0, (3, size * size))[:, :1].expand(3, size * size, 16).flatten(0, 1)
            )
            smooth.bias.zero_()
    tokens = torch.randn(1, 64, 16, dtype=torch.float64)
    jumps = {}
    for name, smooth in (("overlap", head), ("linear", linear)):
        steps = smooth(tokens, (8, 8)).diff(dim=-1).abs().mean((0, 1, 2))
        border = torch.arange(1, 64) % 8 == 0
        jumps[name] = steps[border].mean() / steps[~border].mean().clamp(min=1e-9)
    assert jumps["overlap"] < 2 and jumps["linear"] > 1e6


def test_overlap_head_needs_an_even_patch():
    with pytest.raises(ValueError, match="patch_size must be even for pixel_head 'overlap', got 7"):
        OverlapHead(4, 7)
