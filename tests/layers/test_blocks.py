import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_fae.layers.attention import SelfAttention
from hf_fae.layers.blocks import TransformerBlock, feed_forward
from hf_fae.layers.norms import RMSNorm, normalization


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_rms_norm_is_that_of_torch(dtype, atol):
    ours, theirs = RMSNorm(64, eps=1e-6), nn.RMSNorm(64, eps=1e-6)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.normal_())
    x = torch.randn(3, 5, 64, dtype=dtype) * 7
    torch.testing.assert_close(ours.to(dtype)(x), theirs.to(dtype)(x), atol=atol, rtol=1e-2 if atol > 1e-3 else 1e-5)


def test_rms_norm_gradient_is_that_of_torch():
    x = torch.randn(2, 3, 16)
    gradients = []
    for norm in (RMSNorm(16, eps=1e-6), nn.RMSNorm(16, eps=1e-6)):
        leaf = x.clone().requires_grad_()
        norm(leaf).pow(3).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width, hidden", [(1536, 4096), (1024, 2736), (1152, 3072)])
def test_swiglu_hidden_sizes_of_fae(width, hidden):
    with torch.device("meta"):
        assert feed_forward("swiglu", width, multiple_of=8).net[2].in_features == hidden


@pytest.mark.parametrize("width, hidden", [(512, 1365), (768, 2048), (1024, 2730), (1152, 3072), (1280, 3413)])
def test_swiglu_hidden_sizes_of_lightning_dit_and_detok(width, hidden):
    with torch.device("meta"):
        assert feed_forward("swiglu", width).net[2].in_features == hidden


def test_attention_equals_plain_formulas():
    attention, x = SelfAttention(12, heads=3, head_dim=8), torch.randn(2, 5, 12)
    q, k, v = (layer(x).view(2, 5, 3, 8).transpose(1, 2) for layer in (attention.to_q, attention.to_k, attention.to_v))
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    expected = attention.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)


def test_query_key_norm():
    attention = SelfAttention(12, heads=3, head_dim=8, qk_norm=True)
    with torch.no_grad():
        attention.norm_q.weight.normal_()
        attention.norm_k.weight.normal_()
    x = torch.randn(2, 5, 12)
    q, k, v = (layer(x).view(2, 5, 3, 8) for layer in (attention.to_q, attention.to_k, attention.to_v))
    q = F.rms_norm(q, (8,), attention.norm_q.weight, 1e-6).transpose(1, 2)
    k = F.rms_norm(k, (8,), attention.norm_k.weight, 1e-6).transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.to_out[0](expected))


def test_exact_gelu():
    ff, x = feed_forward("exact_gelu", 8), torch.randn(3, 8)
    torch.testing.assert_close(ff(x), ff.net[2](F.gelu(ff.net[0].proj(x))))
    assert ff.net[2].in_features == 32


def test_layer_scale_multiplies_both_branches():
    block, x = TransformerBlock(16, 2, "layer_norm", layer_scale=1e-5), torch.randn(2, 5, 16)
    assert {parameter.numel() for name, parameter in block.named_parameters() if "scale" in name} == {16}
    torch.testing.assert_close(block(x), x, atol=1e-3, rtol=0)
    with torch.no_grad():
        block.scale1.weight.fill_(2.0)
        block.scale2.weight.fill_(3.0)
    attended = x + 2 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), attended + 3 * block.ff(block.norm2(attended)))


@pytest.mark.parametrize("make", [normalization, feed_forward])
def test_unknown_types(make):
    with pytest.raises(ValueError, match="type must be '.*', got 'other'"):
        make("other", 8)
