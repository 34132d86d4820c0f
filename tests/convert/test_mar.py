"""MAR of LTH14 and of l-DeTok, RasterAR and RandomAR, from their files as published."""

import pytest
import torch
from factories import tiny_autoregressive, tiny_mar, tiny_random_autoregressive
from parity import arrays, assert_parity, assert_round_trip

from hf_fae import FAEMARPipeline, TokenGuidance, build_preset
from hf_fae.convert.mar import (
    FOLD_NORMS,
    autoregressive_config,
    autoregressive_table,
    load_autoregressive,
    load_mar,
    mar_config,
    mar_table,
)
from hf_fae.generators import diffusion_head
from hf_fae.layers.norms import LayerNorm


MARS = ["mar_lth14", "mar_detok"]
ORDERS = ["raster", "random"]


@pytest.fixture(scope="module", params=MARS)
def mar(request, oracle):
    folder = oracle(request.param)
    return load_mar(folder / "checkpoint.pt", None, num_attention_heads=4), arrays(folder / "oracle.npz")


@torch.no_grad()
def test_mar(mar):
    """Conditions of the unknown tokens, and the head."""
    model, io = mar[0].transformer, mar[1]
    tokens, known, count = model.to_tokens(io["latents"]), int(io["known"]), int(io["count"])
    conditions = model.predict_conditions(tokens, io["order"], known, count, io["labels"])
    assert_parity(conditions, io["conditions"])
    assert_parity(model.diffusion_head(io["noisy_tokens"], io["timesteps"], io["conditions"]), io["head"])


@pytest.fixture
def step_noise(mar, monkeypatch):
    """Makes the head add the oracle's noise in each of its steps instead of random numbers."""
    fresh = iter(mar[1]["step_noise"].unflatten(1, (2, 10)))
    monkeypatch.setattr(diffusion_head, "randn_tensor", lambda shape, **options: next(fresh))


@pytest.mark.parametrize("name, scale", [("sample_cfg1_temp0p9", 1.0), ("sample_cfg2p5_temp0p9", 2.5)])
def test_sampler_of_the_head(mar, step_noise, name, scale):
    io = mar[1]
    sample = mar[0].transformer.diffusion_head.sample_tokens(
        io["conditions"],
        io["sample_noise"],
        mar[0].scheduler,
        num_steps=25,
        temperature=0.9,
        negative_condition=io["sample_negative"] if scale != 1 else None,
        guidance=TokenGuidance(scale),
        scale=scale,
    )
    assert_parity(sample, io[name], 1e-4)


def test_generate(mar, step_noise):
    """All unknown tokens in one step, with the oracle's order and noise."""
    pipe, io = mar
    model, known = pipe.transformer, int(io["known"])
    unknown = io["order"][:, known:, None].expand(-1, -1, 16)
    noise = torch.zeros(2, 16, 16).scatter(1, unknown, io["sample_noise"])
    latents = model.generate(
        io["latents"],
        model.to_latents(noise),
        io["order"],
        io["labels"],
        pipe.scheduler,
        num_known=known,
        num_inference_steps=1,
        num_diffusion_steps=25,
        temperature=0.9,
    )
    assert_parity(model.to_tokens(latents).gather(1, unknown), io["sample_cfg1_temp0p9"], 1e-4)


@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_autoregressive(oracle, order):
    folder = oracle(f"detok_ar_{order}")
    io = arrays(folder / "oracle.npz")
    model = load_autoregressive(folder / "checkpoint.pt", None, order, num_attention_heads=4).transformer
    conditions = model.predict_conditions(model.to_tokens(io["latents"]), io["order"], 0, 16, io["labels"])
    assert_parity(conditions, io["conditions"])


def test_settings_are_those_of_calls(oracle):
    settings = {"guidance_scale": 2.9, "num_inference_steps": 2, "num_diffusion_steps": 3, "temperature": 0.95}
    names = {"id2label": {3: "newt"}}
    pipe = load_mar(oracle("mar_lth14") / "checkpoint.pt", None, 4, torch.bfloat16, **settings, **names)
    assert isinstance(pipe, FAEMARPipeline) and pipe.transformer.dtype == torch.bfloat16
    assert pipe.guidance == TokenGuidance(2.9)
    assert {name: pipe.config[name] for name in list(settings)[1:]} == {n: settings[n] for n in list(settings)[1:]}
    pipe.set_progress_bar_config(disable=True)
    assert pipe("newt", output_type="latent").images.shape == (1, 16, 4, 4)


@pytest.mark.parametrize("make", [tiny_mar, tiny_autoregressive, tiny_random_autoregressive])
def test_round_trip(make):
    assert_round_trip(mar_table() if make is tiny_mar else autoregressive_table(), make())


def test_affine_norms_are_part_of_the_modulation():
    weight, bias, tokens, condition = torch.randn(24, 4), torch.randn(24), torch.randn(2, 3, 4), torch.randn(2, 1, 4)
    affine = torch.randn(4, 4)  # gain and bias of both norms
    folded = FOLD_NORMS.to_ours(weight, bias, *affine)
    norm = LayerNorm(4, elementwise_affine=False)
    published, ours = (
        torch.nn.functional.linear(condition, *maps).chunk(6, dim=-1) for maps in ((weight, bias), folded)
    )
    for first, (gain, offset) in ((0, affine[:2]), (3, affine[2:])):
        expected = (norm(tokens) * gain + offset) * (1 + published[first + 1]) + published[first]
        torch.testing.assert_close(norm(tokens, ours[first], ours[first + 1]), expected)
        torch.testing.assert_close(ours[first + 2], published[first + 2])
    again = FOLD_NORMS.to_ours(*FOLD_NORMS.to_published(*folded))
    assert all(torch.equal(one, other) for one, other in zip(again, folded, strict=True))


@pytest.mark.parametrize(
    "name, config, table",
    [
        ("mar-b", mar_config, mar_table),
        ("mar-l", mar_config, mar_table),
        ("mar-h", mar_config, mar_table),
        ("raster-ar-b", lambda state: autoregressive_config(state, "raster"), autoregressive_table),
        ("random-ar-xl", lambda state: autoregressive_config(state, "random"), autoregressive_table),
    ],
)
def test_published_sizes(name, config, table):
    """The published layout of a preset, made from ours, is that preset again."""
    preset = build_preset(name, device="meta")
    published = table().to_published(dict(preset.named_parameters()))
    assert all(preset.config[key] == value for key, value in config(published).items())
    ours = table().to_ours(published)
    assert {key: tensor.shape for key, tensor in ours.items()} == {
        key: tensor.shape for key, tensor in preset.named_parameters()
    }


def test_unknown_heads(oracle):
    for load, arguments in ((load_mar, ()), (load_autoregressive, ("raster",))):
        folder = oracle("mar_lth14" if load is load_mar else "detok_ar_raster")
        with pytest.raises(ValueError, match="num_attention_heads must be given for a width .* published, got 64"):
            load(folder / "checkpoint.pt", None, *arguments)


def test_other_families_are_refused(oracle):
    with pytest.raises(ValueError, match="checkpoint must be of MAR with the key 'encoder_pos_embed_learned'"):
        load_mar(oracle("detok_ar_raster") / "checkpoint.pt", None)
    with pytest.raises(ValueError, match="checkpoint must be of RasterAR or RandomAR with the key 'target_pos_embed'"):
        load_autoregressive(oracle("mar_detok") / "checkpoint.pt", None, "raster")
