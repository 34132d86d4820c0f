import functools

import pytest
import torch
from factories import tiny_dit, tiny_lightning_dit, tiny_sit
from plain_formulas import adaln_block, gelu, layer_norm, rms_norm, sinusoids
from torch.nn import functional as F

from hf_fae import LightningDiTTransformer2DModel
from hf_fae.layers.positions import rotary_angles, sincos_table


def test_fresh_model_predicts_zero():
    """adaLN-zero: the last modulation and the output layer start at zero."""
    model = LightningDiTTransformer2DModel(
        sample_size=4, in_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16, num_classes=3
    )
    sample = model(torch.randn(2, 4, 4, 4), torch.tensor([10.0, 900.0]), torch.tensor([0, 3])).sample
    assert not sample.any()


def test_fresh_blocks_are_the_identity():
    block = LightningDiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=16).blocks[0]
    x = torch.randn(2, 5, 32)
    assert torch.equal(block(x, torch.randn(2, 1, 32)), x)


def test_null_class_time_and_class_matter():
    model, x = tiny_lightning_dit(), torch.randn(1, 4, 4, 4)
    t, label = torch.tensor([500.0]), torch.tensor([3])
    reference = model(x, t, label).sample
    assert not torch.allclose(model(x, t, torch.tensor([10])).sample, reference)
    assert not torch.allclose(model(x, t + 100, label).sample, reference)
    assert torch.equal(model(x, torch.tensor(500.0), label).sample, reference)  # scalar time


def condition_of(model, t, labels):
    """What every modulation reads: silu(time + class), (B, 1, dim)."""
    embedding = model.time_embedding
    time = embedding.linear_2(F.silu(embedding.linear_1(sinusoids(t))))
    return F.silu(time + model.class_embedding(labels))[:, None]


def predict(model, tokens, condition, norm, grid):
    """The final modulated norm and output layer, patch size 1."""
    shift, scale = model.modulation_out(condition).chunk(2, -1)
    return model.proj_out(norm(tokens, model.norm_out) * (1 + scale) + shift).transpose(1, 2).unflatten(2, grid)


def test_one_block_of_lightning_dit_equals_plain_formulas():
    """RMSNorm with gain, SwiGLU and 2-D rotary positions, on a grid that is not square."""
    block, tokens, condition = tiny_lightning_dit().blocks[0], torch.randn(2, 12, 32), torch.randn(2, 1, 32)
    expected = adaln_block(block, tokens, condition, grid=(3, 4))
    actual = block(tokens, condition, rotary_angles(16, (3, 4), tokens.device))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_lightning_dit_equals_plain_formulas():
    model = tiny_lightning_dit(sample_size=[3, 4])
    x, t, labels = torch.randn(2, 4, 3, 4), torch.tensor([100.0, 700.0]), torch.tensor([1, 10])
    condition = condition_of(model, t / 1000, labels)
    tokens = model.proj_in(x).flatten(2).transpose(1, 2) + model.pos_embed.table
    for block in model.blocks:
        tokens = adaln_block(block, tokens, condition, grid=(3, 4))
    expected = predict(model, tokens, condition, rms_norm, (3, 4))
    torch.testing.assert_close(model(x, t, labels).sample, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "ff_type", "approximate", "unit"),
    [
        (tiny_sit, "gelu", "tanh", 1000),
        (tiny_sit, "exact_gelu", "none", 1000),
        (tiny_dit, "gelu", "tanh", 1),
        (tiny_dit, "exact_gelu", "none", 1),
    ],
)
def test_sit_and_dit_equal_plain_formulas(make, ff_type, approximate, unit):
    """LayerNorm without affine, GELU, no rotary positions; DiT reads the number of a step and predicts two halves."""
    model = make(ff_type=ff_type)
    x, t, labels = torch.randn(2, 4, 4, 4), torch.tensor([100.0, 700.0]), torch.tensor([1, 2])
    condition = condition_of(model, t / unit, labels)
    tokens = model.proj_in(x).flatten(2).transpose(1, 2) + model.pos_embed.table
    feed_forward = functools.partial(gelu, approximate=approximate)
    for block in model.blocks:
        tokens = adaln_block(block, tokens, condition, layer_norm, feed_forward)
    expected = predict(model, tokens, condition, layer_norm, (4, 4))
    torch.testing.assert_close(model(x, t, labels).sample, expected, atol=1e-5, rtol=1e-4)


class TestPositions:
    """`pos_embed_type`: what is added to the tokens."""

    inputs = torch.linspace(-1, 1, 64).view(1, 4, 2, 8), torch.tensor(500.0), torch.tensor([3])

    def test_one_dimensional(self):
        model = tiny_lightning_dit(sample_size=[2, 8], pos_embed_type="sincos_1d")
        angles = torch.arange(16)[:, None] * 10000.0 ** -(torch.arange(0, 32, 2) / 32)
        table = model.pos_embed.table[0].unflatten(-1, (-1, 2))
        torch.testing.assert_close(table[..., 0], angles.sin(), atol=1e-5, rtol=0)
        torch.testing.assert_close(table[..., 1], angles.cos(), atol=1e-5, rtol=0)
        assert "pos_embed.table" not in model.state_dict()
        assert model.half().pos_embed.table.dtype == torch.float32

    def test_longer_sequences_continue_the_table(self):
        short, long = (tiny_sit(sample_size=[1, n], pos_embed_type="sincos_1d").pos_embed for n in (8, 16))
        torch.testing.assert_close(short((1, 16), long.table.device), long.table)
        assert torch.equal(short.table, long.table[:, :8])

    def test_learned(self):
        """Trained from the sin-cos table on, and saved."""
        model = tiny_lightning_dit(sample_size=[2, 8], pos_embed_type="learned")
        reference = model(*self.inputs).sample
        model(*self.inputs).sample.square().sum().backward()
        assert model.pos_embed.table.grad.abs().amax(-1).min() > 0
        with torch.no_grad():
            model.state_dict()["pos_embed.table"].zero_()
        assert not torch.allclose(model(*self.inputs).sample, reference)
        fresh = LightningDiTTransformer2DModel(sample_size=4, num_layers=1, pos_embed_type="learned").pos_embed.table
        assert torch.equal(fresh, sincos_table(1152, (4, 4)))

    def test_learned_ones_fit_one_grid(self):
        model = tiny_lightning_dit(sample_size=[2, 8], pos_embed_type="learned")
        with pytest.raises(ValueError, match="hidden_states must have 2 x 8 patches, .* are learned, got 4 x 4"):
            model(torch.randn(1, 4, 4, 4), *self.inputs[1:])

    def test_other_types(self):
        with pytest.raises(ValueError, match="pos_embed_type must be 'sincos', 'sincos_1d' or 'learned', got '2d'"):
            tiny_lightning_dit(pos_embed_type="2d")


def test_patches_and_rectangles():
    model = tiny_lightning_dit(patch_size=2, sample_size=[4, 8])
    assert model.pos_embed.grid == (2, 4)
    for shape in ((1, 4, 4, 8), (2, 4, 6, 2), (1, 4, 2, 256)):
        sample = model(torch.randn(shape), torch.tensor(300.0), torch.zeros(shape[0], dtype=torch.long)).sample
        assert sample.shape == shape and sample.isfinite().all()


def test_patch_layout_matches_pixel_unshuffle():
    """A patch is read and written in place: moving a patch of the input by one patch moves the output alike."""
    model = tiny_lightning_dit(patch_size=2, num_layers=1)
    torch.nn.init.zeros_(model.blocks[0].modulation.weight)
    torch.nn.init.zeros_(model.blocks[0].modulation.bias)  # no mixing between tokens
    x, t, label = torch.zeros(1, 4, 4, 4), torch.tensor(300.0), torch.tensor([0])
    base = model(x, t, label).sample
    x[0, :, 2:, :2] = 1.0
    changed = (model(x, t, label).sample - base).abs().amax(1)[0] > 1e-6
    assert changed[2:, :2].any() and not changed[:2].any() and not changed[:, 2:].any()


def test_q_k_norm_switch():
    model = tiny_lightning_dit(qk_norm=True)
    assert model.blocks[0].attn.norm_q.weight.shape == (16,)
    assert model(torch.randn(1, 4, 4, 4), torch.tensor(1.0), torch.tensor([0])).sample.isfinite().all()
