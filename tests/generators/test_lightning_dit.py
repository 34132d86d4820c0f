import torch
from factories import tiny_lightning_dit, tiny_sit
from torch.nn import functional as F

from hf_fae import LightningDiTTransformer2DModel


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


def test_sit_equals_plain_formulas():
    """An independent SiT: LayerNorm, GELU, sin-cos positions, adaLN-zero."""
    model = tiny_sit(num_layers=1)
    x, t, labels = torch.randn(2, 4, 4, 4), torch.tensor([100.0, 700.0]), torch.tensor([1, 2])
    frequencies = torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
    angles = t[:, None] / 1000 * frequencies
    features = torch.cat([angles.cos(), angles.sin()], -1)
    time = model.time_embedding.linear_2(F.silu(model.time_embedding.linear_1(features)))
    condition = F.silu(time + model.class_embedding(labels))

    tokens = model.proj_in(x).flatten(2).transpose(1, 2) + model.pos_embed.table
    block = model.blocks[0]
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition)[:, None].chunk(6, -1)
    normed = F.layer_norm(tokens, (32,), eps=1e-6) * (1 + scale1) + shift1
    q, k, v = (
        layer(normed).view(2, 16, 2, 16).transpose(1, 2)
        for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v)
    )
    attended = ((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
    tokens = tokens + gate1 * block.attn.to_out[0](attended)
    normed = F.layer_norm(tokens, (32,), eps=1e-6) * (1 + scale2) + shift2
    hidden = F.gelu(block.ff.net[0].proj(normed), approximate="tanh")
    tokens = tokens + gate2 * block.ff.net[2](hidden)
    shift, scale = model.modulation_out(condition)[:, None].chunk(2, -1)
    out = model.proj_out(F.layer_norm(tokens, (32,), eps=1e-6) * (1 + scale) + shift)
    expected = out.transpose(1, 2).view(2, 4, 4, 4)
    torch.testing.assert_close(model(x, t, labels).sample, expected, atol=1e-5, rtol=1e-4)


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
