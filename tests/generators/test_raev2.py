"""RAEv2's denoiser: its size, its start, and which tokens matter."""

import math

import pytest
import torch
from factories import tiny_raev2_dit, tiny_text_raev2_dit
from torch.nn import functional as F

from hf_fae import RAEv2Transformer2DModel
from hf_fae.inspection import count_parameters, inspect


def inputs(batch_size=2, **others):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch_size, 4, 4, 4, generator=generator)
    return {"hidden_states": latents, "timestep": torch.linspace(100, 900, batch_size), **others}


@pytest.mark.parametrize(
    ("config", "exact"),
    [
        ({}, 875_216_500),
        ({"base_head_layer": None}, 869_589_396),
        ({"num_attention_heads": 16}, 620_434_324),
        ({"num_classes": None, "caption_channels": 1024}, 875_240_564),
        ({"num_attention_heads": 16, "head_num_layers": 0, "base_head_layer": None}, 451_757_888),
        ({"num_attention_heads": 16, "head_num_layers": 0}, 452_939_712),
    ],
)
def test_parameters(config, exact):
    """Section 1 of the specification: 256 of them are the fixed frequencies of time."""
    with torch.device("meta"):
        model = RAEv2Transformer2DModel(**config)
    assert count_parameters(model) == exact
    assert sum(parameter.numel() for parameter in model.parameters()) == exact - 256


def test_parts():
    """Section 1 of the specification, by the names of its code."""
    report = inspect("raev2-dit-xl")
    parts = report["parameters"]
    assert parts["total"] == 875_216_500
    assert parts["proj_in"] == 1_476_000 and parts["head_proj_in"] == 2_099_200  # s_embedder, x_embedder
    assert parts["head_condition"] == 2_951_168  # s_projector
    assert parts["time_proj"] + parts["time_embedding"] + parts["time_tokens"] == 2_819_776  # t_embedder
    assert parts["class_embedding"] + parts["class_tokens"] == 1_452_960  # ctx_embedder
    assert parts["blocks"] == 697_230_912 and parts["head_blocks"] == 151_066_452
    assert parts["norm_out"] + parts["modulation_out"] + parts["proj_out"] == 10_492_928  # final_layer
    assert parts["base_head"] == 5_627_104
    assert report["shapes"]["sample"] == [1024, 16, 16]
    text = inspect("raev2-dit-xl-text")
    assert text["parameters"]["total"] == 875_240_564 and text["shapes"]["encoder_hidden_states"] == [256, 1024]


def test_feed_forwards_and_heads():
    with torch.device("meta"):
        model = RAEv2Transformer2DModel()
    assert (model.blocks[0].ff.net[2].in_features, model.head_blocks[0].ff.net[2].in_features) == (3840, 5461)
    assert (model.blocks[0].attn.heads, model.head_blocks[0].attn.heads) == (20, 16)


def test_tensors_of_muon():
    """Section 1: those of two dimensions, which the patch projections are not; w1 and w2 are one tensor in our 30
    blocks, so that 222 there are 192 here."""
    with torch.device("meta"):
        model = RAEv2Transformer2DModel()
    sizes = {True: [], False: []}
    for parameter in model.parameters():
        sizes[parameter.ndim == 2].append(parameter.numel())
    assert len(sizes[True]) == 222 - 30 and sum(sizes[True]) == 871_046_688
    assert sum(sizes[False]) == 4_169_556


@torch.no_grad()
def test_starts_at_zero_and_with_unit_tokens():
    config = {"sample_size": 4, "in_channels": 4, "num_layers": 2, "num_attention_heads": 20, "base_head_layer": 1}
    model = RAEv2Transformer2DModel(**config, head_num_attention_heads=2, head_attention_head_dim=8, num_classes=10)
    output = model(**inputs(class_labels=torch.tensor([1, 2])), output_base_sample=True)
    assert not output.sample.any() and not output.base_sample.any()
    for module in (model.time_tokens, model.class_tokens):
        assert module.tokens.std().item() == pytest.approx(1440**-0.5, rel=0.05)
    for embedding in (model.class_embedding, model.time_embedding.linear_1):
        assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    bound = math.sqrt(6 / (1440 + 4))
    assert bound > model.proj_in.weight.abs().max() > 0.9 * bound


@torch.no_grad()
def test_padded_text_has_no_influence():
    model = tiny_text_raev2_dit()
    embeds, mask = torch.randn(2, 6, 24), torch.arange(6) < torch.tensor([[6], [3]])
    whole = model(**inputs(encoder_hidden_states=embeds, encoder_attention_mask=mask)).sample
    other = torch.where(mask[..., None], embeds, 7.0)
    again = model(**inputs(encoder_hidden_states=other, encoder_attention_mask=mask)).sample
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=1e-5)
    short = inputs(encoder_hidden_states=embeds[1:, :3])
    short = {name: value[-1:] for name, value in short.items()}
    torch.testing.assert_close(model(**short).sample, whole[1:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(**inputs(encoder_hidden_states=embeds)).sample[1], whole[1])


@torch.no_grad()
def test_condition_and_time_matter_to_both_heads():
    model = tiny_raev2_dit()
    base = inputs(class_labels=torch.tensor([1, 2]))
    whole = model(**base, output_base_sample=True)
    for change in ({"class_labels": torch.tensor([3, 4])}, {"timestep": torch.tensor([300.0, 600.0])}):
        other = model(**{**base, **change}, output_base_sample=True)
        for name in ("sample", "base_sample"):
            assert not torch.allclose(other[name], whole[name], atol=1e-3)


@torch.no_grad()
def test_head_condition_is_per_token():
    """The head reads each of its tokens' own image token of the deep part."""
    model, seen = tiny_raev2_dit(), []
    model.head_blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args))
    model.blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out))
    batch = inputs(class_labels=torch.tensor([1, 2]))
    model(**batch)
    deep, (_, condition, _) = seen
    assert deep.shape == (2, 16 + 2 + 3, 32)
    time = model.time_embedding(model.time_proj(batch["timestep"] / 1000))
    expected = F.silu(model.head_condition(F.silu(time[:, None] + deep[:, :16])))
    torch.testing.assert_close(condition, expected)


class TestBadInput:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"base_head_layer": 0}, "base_head_layer must be None or from 1 to num_layers 2, got 0"),
            ({"base_head_layer": 3}, "base_head_layer must be None or from 1 to num_layers 2, got 3"),
            ({"prediction_type": "epsilon"}, "prediction_type must be 'velocity' or 'sample', got 'epsilon'"),
            ({"num_classes": None}, "num_classes must be None exactly with caption_channels, got None and None"),
            ({"caption_channels": 8}, "num_classes must be None exactly with caption_channels, got 10 and 8"),
            ({"attention_head_dim": 6}, "attention_head_dim must be a multiple of 4 .*, got 6"),
            ({"head_attention_head_dim": 6}, "head_attention_head_dim must be a multiple of 4 .*, got 6"),
        ],
    )
    def test_configs(self, config, message):
        with pytest.raises(ValueError, match=message):
            tiny_raev2_dit(**config)

    def test_conditions(self):
        with pytest.raises(ValueError, match="class_labels must be given, got NoneType"):
            tiny_raev2_dit()(**inputs())
        with pytest.raises(ValueError, match="class_labels must be None for a model that was not made for it, got Te"):
            tiny_text_raev2_dit()(**inputs(class_labels=torch.tensor([1, 2])))
        with pytest.raises(ValueError, match=r"encoder_hidden_states must have shape \(2, length, 24\), got"):
            tiny_text_raev2_dit()(**inputs(encoder_hidden_states=torch.zeros(2, 6, 8)))

    def test_no_base_head(self):
        with pytest.raises(ValueError, match="output_base_sample must be False for a model without base_head_layer"):
            tiny_raev2_dit(base_head_layer=None)(**inputs(class_labels=torch.tensor([1, 2])), output_base_sample=True)
