"""DiT^DH from its files as published, also guided by a weaker one."""

import math

import pytest
import torch
from factories import tiny_dit_dh
from parity import arrays, assert_parity, assert_round_trip

from hf_fae import FAEDiTPipeline, build_preset
from hf_fae.convert.dit_dh import dit_dh_config, dit_dh_table, export_dit_dh, load_dit_dh


SHIFT = math.sqrt(48)  # what the oracle's sampler has: that of 16 x 16 x 768


@pytest.fixture(scope="module")
def folder(oracle):
    return oracle("ditdh")


@torch.no_grad()
def test_velocity(folder):
    io = arrays(folder / "oracle.npz")
    model = load_dit_dh(folder / "checkpoint.pt", None).transformer
    assert_parity(model(io["x"], 1000 * io["t_noise"], io["y"]).sample, io["velocity"])


@pytest.mark.parametrize(
    "array, weak, guidance",
    [
        ("sample_plain", None, 1.0),
        ("sample_autoguidance", "weak_checkpoint.pt", 1.42),
        ("sample_cfg2", None, [[0.2, 0.8, 2.0]]),
    ],
)
def test_sampler(folder, array, weak, guidance):
    """50 points are 49 steps, which end at 0.00689."""
    io = arrays(folder / "oracle.npz")
    weak = folder / weak if weak else None
    pipe = load_dit_dh(folder / "checkpoint.pt", None, weak, guidance_scale=guidance, shift=SHIFT)
    pipe.set_progress_bar_config(disable=True)
    sample = pipe(io["sample_labels"].tolist(), latents=io["sample_noise"], output_type="latent").images
    assert_parity(sample, io[array], 1e-4)
    assert pipe.num_timesteps == 49


def test_saved_and_loaded(folder, tmp_path):
    """The settings go with the weights; in half precision the frequencies of time stay in fp32."""
    pipe = load_dit_dh(folder / "checkpoint.pt", None, folder / "weak_checkpoint.pt", 1.42, dtype=torch.bfloat16)
    assert pipe.scheduler.config.shift == math.sqrt(8 * 8 * 24 / 4096)
    frequencies = torch.load(folder / "checkpoint.pt", weights_only=True)["t_embedder.W"]
    assert pipe.transformer.dtype == pipe.guidance_transformer.dtype == torch.bfloat16
    assert torch.equal(pipe.transformer.time_proj.frequencies, frequencies)
    pipe.save_pretrained(tmp_path)
    loaded = FAEDiTPipeline.from_pretrained(tmp_path, vae=None)
    assert loaded.guidance_transformer.config.attention_head_dim == 16
    for name in ("guidance_scale", "num_inference_steps", "final_sigma"):
        assert loaded.config[name] == pipe.config[name]


@pytest.mark.parametrize("name", ["checkpoint.pt", "weak_checkpoint.pt"])
def test_export_is_what_the_published_code_loads(folder, name):
    """Bit by bit, fixed tables included."""
    published = torch.load(folder / name, weights_only=True)
    exported = export_dit_dh(load_dit_dh(folder / name, None).transformer)
    assert exported.keys() == published.keys()
    assert all(torch.equal(exported[key], value) for key, value in published.items())


@pytest.mark.parametrize("config", [{}, {"qk_norm": True}, {"patch_size": 2}, {"head_attention_head_dim": 16}])
def test_round_trip(config):
    model = tiny_dit_dh(head_num_layers=2, **config)
    assert_round_trip(dit_dh_table(model.config), model)
    exported = export_dit_dh(model)
    assert dit_dh_config(exported) == {key: value for key, value in model.config.items() if key[0] != "_"}


def published_shapes(dim, depth, grid, head_dim) -> dict[str, tuple[int, ...]]:
    """DiT^DH on 768 channels: the keys and shapes of its file."""
    wide, tokens, shapes = 2048, grid**2, {}

    def add(name, rows, *columns):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, *columns), (rows,)

    add("s_embedder.proj", dim, 768, 1, 1)
    add("x_embedder.proj", wide, 768, 1, 1)
    add("s_projector", wide, dim)
    add("t_embedder.mlp.0", dim, 512)
    add("t_embedder.mlp.2", dim, dim)
    add("final_layer.adaLN_modulation.1", 2 * wide, wide)
    add("final_layer.linear", 768, wide)
    for i, width in enumerate([dim] * depth + [wide] * 2):
        inner = 8 * width // 3
        add(f"blocks.{i}.attn.qkv", 3 * width, width)
        add(f"blocks.{i}.attn.proj", width, width)
        add(f"blocks.{i}.mlp.w12", 2 * inner, width)
        add(f"blocks.{i}.mlp.w3", width, inner)
        add(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
        shapes[f"blocks.{i}.norm1.weight"] = shapes[f"blocks.{i}.norm2.weight"] = (width,)
    for part, width in (("enc", head_dim), ("dec", 128)):
        shapes |= {f"{part}_feat_rope.freqs_{name}": (tokens, width) for name in ("cos", "sin")}
    others = {"t_embedder.W": (256,), "pos_embed": (1, tokens, dim), "final_layer.norm_final.weight": (wide,)}
    return {**shapes, **others, "y_embedder.embedding_table.weight": (1001, dim)}


@pytest.mark.parametrize(
    "name, shapes, exact",
    [
        ("dit-dh-xl", published_shapes(1152, 28, 16, 72), 838_380_628),
        ("dit-dh-s", published_shapes(384, 12, 16, 64), 196_357_204),
        ("dit-dh-xl-512", published_shapes(1152, 28, 32, 72), 838_380_628),
        ("dit-dh-s-512", published_shapes(384, 12, 32, 64), 196_357_204),
    ],
)
def test_published_size(name, shapes, exact):
    """Every published key has its place in the preset, and every weight of the preset is filled."""
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    preset, config = build_preset(name, device="meta"), dit_dh_config(state)
    assert config == {key: value for key, value in preset.config.items() if key in config}
    without_tables = {key: value for key, value in state.items() if "rope" not in key}
    assert dit_dh_config(without_tables) == config
    ours = dit_dh_table(config).to_ours(state)
    assert {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in preset.state_dict().items()}
    # The frequencies of time are no parameters.
    assert sum(value.numel() for value in ours.values()) == exact + 256
    assert {key: value.shape for key, value in export_dit_dh(preset).items()} == shapes


class TestBadInput:
    def test_other_families(self, oracle):
        with pytest.raises(ValueError, match="checkpoint must be of DiT\\^DH with the key 's_embedder.proj.weight'"):
            load_dit_dh(oracle("sit") / "checkpoint.pt", None)

    def test_weak_model_of_other_classes(self, folder, tmp_path):
        state = torch.load(folder / "weak_checkpoint.pt", weights_only=True)
        state["y_embedder.embedding_table.weight"] = torch.zeros(4, 32)
        torch.save(state, tmp_path / "weak.pt")
        with pytest.raises(ValueError, match="guidance_transformer must have num_classes 10 as transformer, got 3"):
            load_dit_dh(folder / "checkpoint.pt", None, tmp_path / "weak.pt")

    @pytest.mark.parametrize("config", [{"prediction_type": "sample"}, {"base_head_layer": 1}, {"use_meanflow": True}])
    def test_what_rae_does_not_have(self, config):
        with pytest.raises(ValueError, match=f"model must have {next(iter(config))} .* in its published layout, got"):
            export_dit_dh(tiny_dit_dh(**config))

    def test_latents_that_are_not_square(self):
        with pytest.raises(ValueError, match=r"model must have a square sample_size .*, got \[2, 4\]"):
            export_dit_dh(tiny_dit_dh(sample_size=[2, 4]))
