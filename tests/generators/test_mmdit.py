import pytest
import torch
from factories import tiny_mmdit
from torch.nn import functional as F

from hf_fae import MMDiTTransformer2DModel


@pytest.fixture(scope="module")
def model():
    return tiny_mmdit()


def inputs(batch_size=2, length=6):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch_size, 4, 4, 4, generator=generator)
    embeds = torch.randn(batch_size, length, 24, generator=generator)
    return latents, torch.linspace(100, 800, batch_size), embeds


def run(model, *inputs):
    with torch.no_grad():
        return model(*inputs).sample


def test_fresh_model_predicts_zero():
    """adaLN-zero: the modulations and the output layer start at zero."""
    model = MMDiTTransformer2DModel(
        sample_size=4, in_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16, caption_channels=24
    )
    assert not run(model, *inputs()).any()
    x, text = torch.randn(2, 16, 32), torch.randn(2, 6, 32)
    rotary_emb = torch.ones(16, 8), torch.zeros(16, 8)
    first, last = (block(x, text, torch.randn(2, 1, 32), rotary_emb) for block in model.blocks)
    assert torch.equal(first[0], x) and torch.equal(first[1], text)
    assert torch.equal(last[0], x) and last[1] is None


def test_time_and_text_matter(model):
    x, t, text = inputs(1)
    reference = run(model, x, t, text)
    assert not torch.allclose(run(model, x, t + 100, text), reference)
    assert not torch.allclose(run(model, x, t, text + 1), reference)
    assert torch.equal(run(model, x, t[0], text), reference)  # scalar time


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_plain_formulas(qk_norm):
    """An independent MMDiT of two blocks, with a mask."""
    model = tiny_mmdit(qk_norm=qk_norm)
    x, t, embeds = inputs()
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    frequencies = torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
    angles = t[:, None] / 1000 * frequencies
    features = torch.cat([angles.cos(), angles.sin()], -1)
    condition = F.silu(model.time_embedding.linear_2(F.silu(model.time_embedding.linear_1(features))))
    image = model.proj_in(x).flatten(2).transpose(1, 2) + model.pos_embed.table
    text = model.caption_projection(embeds)

    turns = 10000.0 ** -(torch.arange(4) / 4)
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    turned = torch.polar(torch.ones(16, 8), torch.cat([rows[:, None] * turns, columns[:, None] * turns], -1))

    def heads(x, norm=None):
        x = x.view(2, -1, 2, 16)
        return (x if norm is None else F.rms_norm(x, (16,), norm.weight, 1e-6)).transpose(1, 2)

    def turn(x):
        pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * turned
        return torch.stack([pairs.real, pairs.imag], -1).flatten(-2)

    def modulated(x, shift, scale):
        return F.layer_norm(x, (32,), eps=1e-6) * (1 + scale) + shift

    def mixed(ff, x):
        value, gate = (x @ ff.net[0].proj.weight.T).chunk(2, -1)
        return (value * F.silu(gate)) @ ff.net[2].weight.T

    for block in model.blocks:
        attn, is_last = block.attn, block is model.blocks[-1]
        ours = block.modulation(condition)[:, None].chunk(6, -1)
        theirs = block.modulation_context(condition)[:, None].chunk(2 if is_last else 6, -1)
        a, b = modulated(image, *ours[:2]), modulated(text, *theirs[:2])
        query = turn(heads(attn.to_q(a), attn.norm_q))
        if not is_last:
            query = torch.cat([query, heads(attn.add_q_proj(b), attn.norm_added_q)], 2)
        key = torch.cat([turn(heads(attn.to_k(a), attn.norm_k)), heads(attn.add_k_proj(b), attn.norm_added_k)], 2)
        value = torch.cat([heads(attn.to_v(a)), heads(attn.add_v_proj(b))], 2)
        scores = (query @ key.transpose(-1, -2) / 4).masked_fill(
            ~F.pad(mask, (16, 0), value=True)[:, None, None], -1e9
        )
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        image = image + ours[2] * attn.to_out[0](attended[:, :16])
        image = image + ours[5] * mixed(block.ff, modulated(image, *ours[3:5]))
        if not is_last:
            text = text + theirs[2] * attn.to_add_out(attended[:, 16:])
            text = text + theirs[5] * mixed(block.ff_context, modulated(text, *theirs[3:5]))
    shift, scale = model.modulation_out(condition)[:, None].chunk(2, -1)
    expected = model.proj_out(modulated(image, shift, scale)).transpose(1, 2).view(2, 4, 4, 4)
    torch.testing.assert_close(model(x, t, embeds, mask).sample, expected, atol=1e-5, rtol=1e-4)


def test_what_is_masked_has_no_influence(model):
    x, t, text = inputs()
    mask = torch.tensor([[True] * 3 + [False] * 3, [False] * 6])
    expected = run(model, x, t, text, mask)
    assert torch.equal(run(model, x, t, torch.where(mask[..., None], text, 100.0), mask), expected)
    longer = F.pad(text, (0, 0, 0, 5), value=7.0), F.pad(mask, (0, 5))
    torch.testing.assert_close(run(model, x, t, *longer), expected, atol=1e-5, rtol=1e-4)
    alone = run(model, x[:1], t[:1], text[:1, :3])
    torch.testing.assert_close(alone, expected[:1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(run(model, x, t, text), expected, atol=1e-3)
    assert torch.equal(run(model, x, t, text, torch.ones(2, 6, dtype=torch.bool)), run(model, x, t, text))


def test_the_order_of_text_tokens_is_that_of_their_embeddings(model):
    """No position is added to them: it is the text encoder that knows it."""
    x, t, text = inputs()
    torch.testing.assert_close(run(model, x, t, text.flip(1)), run(model, x, t, text), atol=1e-5, rtol=1e-4)


def test_text_tokens_without_output_compute_no_queries(model):
    first, last = model.blocks
    assert first.attn.add_q_proj.weight.shape == (32, 32) and first.modulation_context.out_features == 6 * 32
    assert last.attn.add_q_proj is last.attn.to_add_out is last.ff_context is None
    assert last.modulation_context.out_features == 2 * 32


def test_patches_and_rectangles():
    model = tiny_mmdit(patch_size=2, sample_size=[4, 8])
    for shape in ((1, 4, 4, 8), (2, 4, 6, 2), (1, 4, 2, 256)):
        sample = run(model, torch.randn(shape), torch.tensor(300.0), torch.randn(shape[0], 3, 24))
        assert sample.shape == shape and sample.isfinite().all()


def test_embeddings_in_another_precision_than_the_model():
    model = tiny_mmdit().bfloat16()
    x, t, text = inputs()
    assert run(model, x.bfloat16(), t, text).dtype == torch.bfloat16
