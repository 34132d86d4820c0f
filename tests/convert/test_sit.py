"""SiT, REPA, MAETok's SiT and l-DeTok's from their files as published."""

import pytest
import torch
from factories import tiny_sit
from parity import arrays, assert_parity, assert_round_trip

from hf_fae import FlowMatchEulerMaruyamaScheduler, build_preset
from hf_fae.convert.denoisers import (
    DETOK_SIT,
    MAETOK_SIT,
    REPA,
    SIT,
    denoiser_config,
    denoiser_table,
    export_denoiser,
    publish_denoiser,
)
from hf_fae.convert.sit import load_detok_sit, load_maetok_sit, load_repa, load_sit


LOADERS = {"sit": load_sit, "repa_sit": load_repa, "maetok_sit": load_maetok_sit, "detok_sit": load_detok_sit}
LAYOUTS = {"sit": SIT, "repa_sit": REPA, "maetok_sit": MAETOK_SIT, "detok_sit": DETOK_SIT}
TIME = ("time_embedding.linear_1.weight",)


def load(oracle, name, *arguments, **settings):
    folder = oracle(name)
    pipe = LOADERS[name](folder / "checkpoint.pt", None, *arguments, num_attention_heads=4, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe, arrays(folder / "oracle.npz")


@pytest.mark.parametrize("name", ["sit", "detok_sit"])
@torch.no_grad()
def test_velocity_in_data_time(oracle, name):
    """Theirs is x - eps at u = 1 - t; of SiT's eight channels, four are used."""
    pipe, io = load(oracle, name)
    assert_parity(pipe.transformer(io["x"], 1000 * (1 - io["t_data"]), io["y"]).sample, -io["velocity"])


@torch.no_grad()
def test_velocity_of_repa(oracle):
    pipe, io = load(oracle, "repa_sit")
    assert_parity(pipe.transformer(io["x"], 1000 * io["t_noise"], io["y"]).sample, io["velocity"])


@torch.no_grad()
def test_velocity_of_tokens_in_a_row(oracle):
    """Theirs are (B, N, C), ours (B, C, 1, N)."""
    pipe, io = load(oracle, "maetok_sit")
    assert pipe.transformer.config.sample_size == [1, 16]
    latents = io["x"].transpose(1, 2)[:, :, None]
    velocity = pipe.transformer(latents, 1000 * io["t_noise"], io["y"]).sample
    assert_parity(velocity[:, :, 0].transpose(1, 2), io["velocity"])


@pytest.mark.parametrize(
    "name, array, steps, guidance",
    [
        # SiT counts the points of its grid, REPA the steps.
        ("sit", "sample_euler20_cfg4", 19, {"intervals": [[0, 1, 4.0]], "channels": 3}),
        ("repa_sit", "sample_euler20_cfg1p8_0_0p7", 20, [[0, 0.7, 1.8]]),
    ],
)
def test_sampler(oracle, name, array, steps, guidance):
    pipe, io = load(oracle, name, "ode", num_inference_steps=steps, guidance_scale=guidance)
    sample = pipe(io["sample_labels"].tolist(), latents=io["sample_noise"], output_type="latent").images
    assert_parity(sample, io[array], 1e-4)


def test_default_samplers(oracle):
    for name in LOADERS:
        pipe, _ = load(oracle, name)
        assert isinstance(pipe.scheduler, FlowMatchEulerMaruyamaScheduler) == (name != "detok_sit")
    pipe, _ = load(oracle, "sit", dtype=torch.float16, id2label={1: "newt"})
    assert pipe.scheduler.config.last_sigma == 0.04 and pipe.config.num_inference_steps == 250
    assert pipe.transformer.dtype == torch.float16 and pipe.label2id == {"newt": 1}


def test_legacy_blocks_of_repa(oracle, tmp_path):
    """Blocks behind the aligned one are numbered from 0 as `decoder_blocks`."""
    state = torch.load(oracle("repa_sit") / "checkpoint.pt", weights_only=True)
    torch.save(
        {key.replace("blocks.1.", "decoder_blocks.0."): value for key, value in state.items()}, tmp_path / "l.pt"
    )
    legacy = load_repa(tmp_path / "l.pt", None, num_attention_heads=4).transformer.state_dict()
    expected = load(oracle, "repa_sit")[0].transformer.state_dict()
    assert legacy.keys() == expected.keys()
    assert all(torch.equal(legacy[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["sit", "maetok_sit", "detok_sit"])
def test_export(oracle, name):
    """What the published code loads strictly; of SiT's unused channels, the zeros."""
    content = torch.load(oracle(name) / "checkpoint.pt", weights_only=True)
    published = content.get("model_ema", content)
    model = load(oracle, name)[0].transformer
    exported = export_denoiser(model)
    assert {key: value.shape for key, value in exported.items()} == {k: v.shape for k, v in published.items()}
    again = denoiser_table(LAYOUTS[name], model.config).to_ours(exported)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=1.2e-7 * float(value.abs().max()))
    unused = exported["final_layer.linear.bias"].view(-1, 8)[:, 4:] if name == "sit" else torch.zeros(1)
    assert not unused.any()


@pytest.mark.parametrize(
    "layout, config",
    [
        (SIT, {"patch_size": 2}),
        (REPA, {"patch_size": 2}),
        (MAETOK_SIT, {"sample_size": [1, 16], "pos_embed_type": "sincos_1d"}),
        (DETOK_SIT, {"ff_type": "exact_gelu"}),
    ],
)
def test_round_trip(layout, config):
    model = tiny_sit(**config)
    assert_round_trip(denoiser_table(layout, model.config), model, rounded=TIME if layout.data_time else ())


def published_shapes(channels, tokens, blocks="blocks", patches=None, patch_size=1) -> dict[str, tuple[int, ...]]:
    """SiT-XL: the keys and shapes of a file with `channels` channels of the output."""
    dim, shapes = 1152, {"pos_embed": (1, tokens, 1152), "y_embedder.embedding_table.weight": (1001, 1152)}

    def add(name, rows, *columns):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, *columns), (rows,)

    add(*patches)
    add("t_embedder.mlp.0", dim, 256)
    add("t_embedder.mlp.2", dim, dim)
    add("final_layer.adaLN_modulation.1", 2 * dim, dim)
    add("final_layer.linear", channels * patch_size**2, dim)
    for i in range(28):
        add(f"{blocks}.{i}.attn.qkv", 3 * dim, dim)
        add(f"{blocks}.{i}.attn.proj", dim, dim)
        add(f"{blocks}.{i}.mlp.fc1", 4 * dim, dim)
        add(f"{blocks}.{i}.mlp.fc2", dim, 4 * dim)
        add(f"{blocks}.{i}.adaLN_modulation.1", 6 * dim, dim)
    return shapes


@pytest.mark.parametrize(
    "preset, layout, shapes, exact",
    [
        (
            "sit-xl-2",
            SIT,
            published_shapes(8, 256, patches=("x_embedder.proj", 1152, 4, 2, 2), patch_size=2),
            674_816_272,
        ),
        (
            "sit-xl-2",
            REPA,
            published_shapes(4, 256, patches=("x_embedder.proj", 1152, 4, 2, 2), patch_size=2),
            674_816_272,
        ),
        ("sit-xl-1-maetok", MAETOK_SIT, published_shapes(32, 128, patches=("x_embedder", 1152, 32)), 674_853_152),
        (
            "sit-xl-1-detok",
            DETOK_SIT,
            published_shapes(16, 256, "transformer.blocks", ("x_embedder.proj", 1152, 16, 1, 1)),
            674_816_272,
        ),
    ],
)
def test_published_size(preset, layout, shapes, exact):
    """Every published key has its place in the preset, and every weight of the preset is filled."""
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config, model = denoiser_config(state, layout), build_preset(preset, device="meta")
    assert config == {name: value for name, value in model.config.items() if name[0] != "_"}
    ours = denoiser_table(layout, config).to_ours(state)
    assert {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(value.numel() for value in ours.values()) == exact
    assert {key: value.shape for key, value in publish_denoiser(model, layout).items()} == shapes


class TestBadInput:
    def test_heads_of_an_unknown_width(self, oracle):
        with pytest.raises(ValueError, match="num_attention_heads must be given for a width .* published, got 64"):
            load_sit(oracle("sit") / "checkpoint.pt", None)

    def test_other_families(self, oracle):
        sit, repa = (oracle(name) / "checkpoint.pt" for name in ("sit", "repa_sit"))
        with pytest.raises(ValueError, match="checkpoint must have tensors of the shapes of its family"):
            load_sit(repa, None, num_attention_heads=4)  # of four channels
        with pytest.raises(ValueError, match="checkpoint must be of a DiT-like denoiser with the key 'x_embedder.we"):
            load_maetok_sit(sit, None, num_attention_heads=4)
        with pytest.raises(ValueError, match="checkpoint must hold only keys of its family, got 'blocks.0"):
            load_detok_sit(repa, None, num_attention_heads=4)

    def test_sampler(self, oracle):
        with pytest.raises(ValueError, match="sampler must be 'ode' or 'sde', got 'dopri5'"):
            load_sit(oracle("sit") / "checkpoint.pt", None, "dopri5", num_attention_heads=4)

    def test_raw_weights_are_not_published(self, oracle, tmp_path):
        content = torch.load(oracle("detok_sit") / "checkpoint.pt", weights_only=True)
        torch.save({"model": content["model"]}, tmp_path / "raw.pt")
        with pytest.raises(ValueError, match="must hold averaged weights under 'model_ema'"):
            load_detok_sit(tmp_path / "raw.pt", None)
