"""DRoRAE's fusion: its formulas, and what cancels in them."""

import torch
from torch.nn import functional as F

from hf_fae.autoencoders.layer_fusion import LayerFusion, backbone_norm


def states(count=5):
    """Normalised states (3, count, 16, 32) of layers."""
    return backbone_norm(torch.randn(3, count, 16, 32, generator=torch.Generator().manual_seed(1)))


def make_fusion(count=5):
    torch.manual_seed(2)
    fusion = LayerFusion(32, count, 24, "gelu")
    torch.nn.init.normal_(fusion.router.weight)
    return fusion


def test_equals_plain_formulas():
    layers, fusion = states(), make_fusion()
    weights = torch.cat(list(layers.unbind(1)), dim=-1) @ fusion.router.weight.T + fusion.router.bias
    mixed = torch.zeros(3, 16, 32)
    for k, expert in enumerate(fusion.experts):
        hidden = layers[:, k] @ expert.proj_in.weight.T + expert.proj_in.bias
        hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        output = F.gelu(hidden) @ expert.proj_out.weight.T + expert.proj_out.bias
        mixed += weights[..., k : k + 1] * F.layer_norm(output, (32,), eps=1e-6)
    expected = F.layer_norm(mixed / weights.norm(dim=-1, keepdim=True), (32,), eps=1e-6)
    torch.testing.assert_close(fusion(layers), expected, atol=1e-4, rtol=1e-4)
    assert (weights < 0).any() and (weights.abs() > 1).any()  # signed, and not normalised to 1


def test_the_divisor_cancels_under_the_norm():
    layers, fusion = states(), make_fusion()
    reference = fusion(layers)
    fusion.router.weight.data *= 100
    fusion.router.bias.data *= 100
    torch.testing.assert_close(fusion(layers), reference, atol=2e-5, rtol=1e-4)
