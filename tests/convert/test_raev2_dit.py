"""RAEv2's denoiser from its file as published, with and without internal guidance."""

import math

import pytest
import torch
from factories import tiny_raev2_dit, tiny_text_raev2_dit
from parity import arrays, assert_parity, assert_round_trip

from hf_fae import FAEDiTPipeline, build_preset
from hf_fae.convert.raev2_dit import export_raev2_dit, load_raev2_dit, raev2_dit_config, raev2_dit_table
from hf_fae.generators.prediction import to_velocity


@pytest.fixture(scope="module")
def folder(oracle):
    return oracle("raev2")


def load(folder, **kwargs):
    return load_raev2_dit(folder / "checkpoint.pt", None, base_head_layer=1, **kwargs)


@torch.no_grad()
def test_predictions(folder):
    """Of both heads; the file's raw weights are zero."""
    io, model = arrays(folder / "oracle.npz"), load(folder).transformer
    output = model(io["x"], 1000 * io["t_noise"], io["y"], output_base_sample=True)
    assert_parity(output.sample, io["prediction"])
    assert_parity(output.base_sample, io["base_prediction"])
    assert_parity(to_velocity("sample", output.sample, io["x"], io["t_noise"]), io["velocity"])


@pytest.mark.parametrize("array, scale", [("sample_plain20", 1.0), ("sample_ig1p78_20", [[0.1, 1.0, 1.78]])])
def test_sampler(folder, array, scale):
    io = arrays(folder / "oracle.npz")
    pipe = load(folder, internal_guidance_scale=scale, num_inference_steps=20, shift=8.0)
    pipe.set_progress_bar_config(disable=True)
    sample = pipe(io["sample_labels"].tolist(), latents=io["sample_noise"], output_type="latent").images
    assert_parity(sample, io[array], 1e-4)


def test_saved_and_loaded(folder, tmp_path):
    """The settings go with the weights; in half precision the frequencies of time stay in fp32."""
    pipe = load(folder, internal_guidance_scale=[[0.1, 1.0, 1.78]], dtype=torch.bfloat16)
    assert pipe.scheduler.config.shift == math.sqrt(4 * 4 * 16 / 4096)
    frequencies = torch.load(folder / "checkpoint.pt", weights_only=True)["ema"]["t_embedder.W"]
    assert pipe.transformer.dtype == torch.bfloat16
    assert torch.equal(pipe.transformer.time_proj.frequencies, frequencies)
    pipe.save_pretrained(tmp_path)
    loaded = FAEDiTPipeline.from_pretrained(tmp_path, vae=None)
    loaded.set_progress_bar_config(disable=True)
    loaded(1, num_inference_steps=2, output_type="latent")
    assert loaded.internal_guidance.intervals == ((0.1, 1.0, 1.78),)
    assert loaded.config.num_inference_steps == 100


def test_export_is_what_the_published_code_loads(folder):
    """Bit by bit, fixed tables included."""
    published = torch.load(folder / "checkpoint.pt", weights_only=True)["ema"]
    exported = export_raev2_dit(load(folder).transformer)
    assert exported.keys() == published.keys()
    assert all(torch.equal(exported[key], value) for key, value in published.items())


@pytest.mark.parametrize("config", [{}, {"patch_size": 2}, {"base_head_layer": None}, {"num_layers": 3}])
def test_round_trip(config):
    model = tiny_raev2_dit(**config)
    assert_round_trip(raev2_dit_table(model.config), model)
    found = raev2_dit_config(export_raev2_dit(model), base_head_layer=1)
    assert found == {key: model.config[key] for key in found}


def published_shapes(dim=1440, depth=28, head_dim=72) -> dict[str, tuple[int, ...]]:
    """RAEv2 on 1024 channels: the keys and shapes of its file."""
    wide, shapes = 2048, {}

    def add(name, rows, *columns):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, *columns), (rows,)

    add("s_embedder.proj", dim, 1024, 1, 1)
    add("x_embedder.proj", wide, 1024, 1, 1)
    add("s_projector", wide, dim)
    add("t_embedder.mlp.0", dim, 512)
    add("t_embedder.mlp.2", dim, dim)
    for name, width in (("final_layer", wide), ("base_final_layer", dim)):
        add(f"{name}.adaln_modulation.1", 2 * width, width)
        add(f"{name}.linear", 1024, width)
        shapes[f"{name}.norm.weight"] = (width,)
    for i, (width, each) in enumerate([(dim, head_dim)] * depth + [(wide, 128)] * 2):
        inner = 8 * width // 3
        for name in ("q", "k", "v", "proj"):
            add(f"blocks.{i}.attn.{name}", width, width)
        add(f"blocks.{i}.mlp.w1", inner, width)
        add(f"blocks.{i}.mlp.w2", inner, width)
        add(f"blocks.{i}.mlp.w3", width, inner)
        shapes |= {f"blocks.{i}.attn.{name}_norm.weight": (each,) for name in "qk"}
        shapes |= {f"blocks.{i}.norm{number}.weight": (width,) for number in (1, 2)}
        if i >= depth:
            add(f"blocks.{i}.adaln_modulation.1", 6 * width, width)
    shapes |= {f"enc_rope.freqs_{name}": (268, head_dim) for name in ("cos", "sin")}
    shapes |= {f"dec_rope.freqs_{name}": (256, 128) for name in ("cos", "sin")}
    shapes |= {"t_embedder.learnable_tokens": (4, dim), "ctx_embedder.learnable_tokens": (8, dim)}
    return {**shapes, "t_embedder.W": (256,), "ctx_embedder.embedding_table.weight": (1001, dim)}


def test_published_size():
    """Every published key has its place in the preset, and every weight of the preset is filled."""
    shapes = published_shapes()
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    preset, config = build_preset("raev2-dit-xl", device="meta"), raev2_dit_config(state)
    assert config == {key: preset.config[key] for key in config}
    ours = raev2_dit_table(config).to_ours(state)
    assert {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in preset.state_dict().items()}
    assert sum(value.numel() for value in ours.values()) == 875_216_500
    assert {key: value.shape for key, value in export_raev2_dit(preset).items()} == shapes


def test_training_heads_are_dropped(folder, tmp_path):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["ema"]["repa_projector.weight"] = torch.zeros(8, 60)
    torch.save(state, tmp_path / "checkpoint.pt")
    assert load(tmp_path).transformer.config.num_layers == 2


class TestBadInput:
    def test_other_families(self, oracle):
        with pytest.raises(
            ValueError, match="checkpoint must be of RAEv2's denoiser with the key 's_projector|ctx_em"
        ):
            load_raev2_dit(oracle("ditdh") / "checkpoint.pt", None)

    def test_models_without_a_published_layout(self):
        with pytest.raises(ValueError, match=r"model must have a square sample_size .*, got \[2, 4\]"):
            export_raev2_dit(tiny_raev2_dit(sample_size=[2, 4]))
        with pytest.raises(
            ValueError, match="model must have prediction_type 'sample' in its published layout, got 'v"
        ):
            export_raev2_dit(tiny_raev2_dit(prediction_type="velocity"))
        for model in (tiny_text_raev2_dit(), tiny_raev2_dit(head_num_layers=0)):
            with pytest.raises(
                ValueError, match="model must have classes and a head in its published layout, got num_"
            ):
                export_raev2_dit(model)
