"""DiT^DH: the backbone speaks to the head token by token, and to nothing else."""

import math

import pytest
import torch
from factories import tiny_dit_dh
from torch.nn import functional as F

from hf_fae import DiTDHTransformer2DModel
from hf_fae.layers.positions import apply_rotary, rotary_angles


INPUTS = torch.tensor([100.0, 700.0]), torch.tensor([1, 2])


def run_block(block, tokens, condition, angles):
    """The formulas of an adaLN-zero block with RMSNorm and SwiGLU, written anew; `condition` (B, N, C)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition).chunk(6, -1)

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    normed = norm(tokens, block.norm1.weight) * (1 + scale1) + shift1
    heads, width = block.attn.heads, block.attn.head_dim
    q, k, v = (
        layer(normed).unflatten(-1, (heads, width)) for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v)
    )
    q, k, v = (x.transpose(1, 2) for x in (apply_rotary(q, *angles), apply_rotary(k, *angles), v))
    attended = ((q @ k.transpose(-1, -2) / math.sqrt(width)).softmax(-1) @ v).transpose(1, 2).flatten(2)
    tokens = tokens + gate1 * block.attn.to_out[0](attended)
    normed = norm(tokens, block.norm2.weight) * (1 + scale2) + shift2
    value, gate = block.ff.net[0].proj(normed).chunk(2, -1)
    return tokens + gate2 * block.ff.net[2](value * F.silu(gate))


def test_equals_plain_formulas():
    model, latents, (t, labels) = tiny_dit_dh(), torch.randn(2, 4, 4, 4), INPUTS
    angles = 2 * math.pi * t[:, None] / 1000 * model.time_proj.frequencies
    time = model.time_embedding(torch.cat([angles.sin(), angles.cos()], -1))
    condition = F.silu(time + model.class_embedding(labels))[:, None].expand(-1, 16, -1)
    tokens = model.proj_in(latents).flatten(2).transpose(1, 2) + model.pos_embed.table
    for block in model.blocks:
        tokens = run_block(block, tokens, condition, rotary_angles(16, (4, 4), tokens.device))
    condition = model.head_condition(F.silu(time[:, None] + tokens))
    tokens = model.head_proj_in(latents).flatten(2).transpose(1, 2)
    tokens = run_block(model.head_blocks[0], tokens, condition, rotary_angles(24, (4, 4), tokens.device))
    shift, scale = model.modulation_out(condition).chunk(2, -1)
    tokens = tokens * (tokens.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * model.norm_out.weight
    expected = model.proj_out(tokens * (1 + scale) + shift).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(model(latents, t, labels).sample, expected, atol=1e-4, rtol=1e-3)


def test_fresh_model_predicts_zero():
    with torch.random.fork_rng():
        model = DiTDHTransformer2DModel(
            sample_size=4,
            in_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            head_num_attention_heads=2,
            head_attention_head_dim=16,
            num_classes=3,
        )
    assert not model(torch.randn(2, 4, 4, 4), *INPUTS).sample.any()


def test_class_and_time_reach_the_head_through_the_backbone_alone():
    model, latents, (t, labels) = tiny_dit_dh(), torch.randn(2, 4, 4, 4), INPUTS
    reference = model(latents, t, labels).sample
    assert not torch.allclose(model(latents, t, labels + 1).sample, reference)
    assert not torch.allclose(model(latents, t + 100, labels).sample, reference)
    torch.nn.init.zeros_(model.head_condition.weight)  # now the head hears nothing
    assert torch.equal(model(latents, t, labels + 1).sample, model(latents, t + 100, labels).sample)


def test_time_frequencies_are_saved_and_never_rounded(tmp_path):
    model = tiny_dit_dh()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = DiTDHTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for other in (model, loaded):
        assert torch.equal(other.time_proj.frequencies, tiny_dit_dh().time_proj.frequencies)


@pytest.mark.parametrize("name", ["attention_head_dim", "head_attention_head_dim"])
def test_head_widths_without_rotary_pairs(name):
    with pytest.raises(ValueError, match=rf"^{name} must be a multiple of 4 .*, got 6"):
        tiny_dit_dh(**{name: 6})


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_dit_dh()
        if checkpointing:
            model.enable_gradient_checkpointing()
        latents = torch.linspace(-1, 1, 128).view(2, 4, 4, 4)
        model(latents, *INPUTS).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
