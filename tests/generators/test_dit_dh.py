"""DiT^DH: each token of the backbone conditions its own token of the head, and nothing else."""

import math

import pytest
import torch
from factories import tiny_dit_dh
from plain_formulas import adaln_block, rms_norm
from torch.nn import functional as F

from hf_fae import DiTDHTransformer2DModel


INPUTS = torch.tensor([100.0, 700.0]), torch.tensor([1, 2])


def plain_sample(model, latents, t, labels):
    """The formulas of the paper's code: each condition is made by a SiLU, and each modulation is Linear(SiLU(c))."""
    grid = latents.shape[2:]
    angles = 2 * math.pi * t[:, None] / 1000 * model.time_proj.frequencies
    time = model.time_embedding(torch.cat([angles.sin(), angles.cos()], -1))
    condition = F.silu(time + model.class_embedding(labels))[:, None]
    tokens = model.proj_in(latents).flatten(2).transpose(1, 2) + model.pos_embed.table
    for block in model.blocks:
        tokens = adaln_block(block, tokens, F.silu(condition), grid=grid)
    condition = model.head_condition(F.silu(time[:, None] + tokens))
    tokens = model.head_proj_in(latents).flatten(2).transpose(1, 2)
    for block in model.head_blocks:
        tokens = adaln_block(block, tokens, F.silu(condition), grid=grid)
    shift, scale = model.modulation_out(F.silu(condition)).chunk(2, -1)
    tokens = rms_norm(tokens, model.norm_out) * (1 + scale) + shift
    return model.proj_out(tokens).transpose(1, 2).unflatten(2, grid)


def test_equals_plain_formulas():
    model, latents = tiny_dit_dh(), torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(
        model(latents, *INPUTS).sample, plain_sample(model, latents, *INPUTS), atol=1e-4, rtol=1e-3
    )


def test_head_as_wide_as_the_backbone_reads_its_tokens_directly():
    """There is no map between widths that are equal."""
    model, latents = tiny_dit_dh(head_attention_head_dim=16), torch.randn(2, 4, 4, 4)
    assert not any(name.startswith("head_condition") for name in model.state_dict())
    torch.testing.assert_close(
        model(latents, *INPUTS).sample, plain_sample(model, latents, *INPUTS), atol=1e-4, rtol=1e-3
    )


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
    torch.nn.init.zeros_(model.head_condition.weight)  # now nothing reaches the head
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
