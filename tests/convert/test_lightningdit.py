"""LightningDiT from its file as published, on VA-VAE."""

import pytest
import torch
from factories import tiny_lightning_dit
from parity import arrays, assert_parity, assert_round_trip

from hf_fae import FAEDiTPipeline, build_preset
from hf_fae.convert.autoencoder_kl import load_autoencoder_kl
from hf_fae.convert.denoisers import LIGHTNINGDIT, denoiser_config, denoiser_table, export_denoiser
from hf_fae.convert.lightningdit import load_lightningdit


GUIDANCE = {"intervals": [[0, 0.9, 6.7]], "channels": 3}  # cfg_interval_start 0.10


@pytest.fixture(scope="module")
def folder(oracle):
    return oracle("lightningdit")


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = load_lightningdit(folder / "checkpoint.pt", None, GUIDANCE, num_inference_steps=12)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_velocity(pipe, folder):
    """Theirs is x - eps at u = 1 - t."""
    io = arrays(folder / "oracle.npz")
    assert_parity(pipe.transformer(io["x"], 1000 * (1 - io["t_data"]), io["y"]).sample, -io["velocity"])


def test_sampler(pipe, folder):
    """13 points are 12 steps; guidance of three channels, up to noise time 0.9."""
    io = arrays(folder / "oracle.npz")
    sample = pipe(io["sample_labels"].tolist(), latents=io["sample_noise"], output_type="latent").images
    assert_parity(sample, io["sample"], 1e-4)


def test_published_sampler(folder):
    pipe = load_lightningdit(folder / "checkpoint.pt", None)
    assert len(pipe.prepare_timesteps(pipe.config.num_inference_steps, None)) == 249
    points = torch.linspace(1, 0, 250)
    torch.testing.assert_close(pipe.scheduler.sigmas, points / (0.3 + 0.7 * points), atol=1e-6, rtol=1e-5)


def test_images(folder, oracle, tmp_path):
    """With the tokenizer, saved and loaded."""
    vae = load_autoencoder_kl(oracle("vavae") / "checkpoint.pt", folder / "latents_stats.pt")
    load_lightningdit(folder / "checkpoint.pt", vae, GUIDANCE, 2, dtype=torch.bfloat16).save_pretrained(tmp_path)
    pipe = FAEDiTPipeline.from_pretrained(tmp_path, dtype={"transformer": torch.bfloat16, "default": torch.float32})
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.guidance.channels == 3
    noise = torch.randn(1, 4, 8, 8)
    images = pipe(3, latents=noise, output_type="np").images
    assert images.shape == (1, 16, 16, 3) and 0 < images.std() < 1
    latents = pipe(3, latents=noise, output_type="latent").images
    statistics = torch.load(folder / "latents_stats.pt", weights_only=True)
    with torch.no_grad():
        expected = vae.decode(latents * statistics["std"] + statistics["mean"]).sample
    torch.testing.assert_close(torch.from_numpy(images).movedim(-1, 1), (expected / 2 + 0.5).clamp(0, 1))


def test_export_is_what_the_published_code_loads(pipe, folder):
    """All keys and shapes, fixed tables included; values to the last bit but where time is reversed."""
    published = torch.load(folder / "checkpoint.pt", weights_only=True)["ema"]
    exported = export_denoiser(pipe.transformer)
    assert exported.keys() == published.keys()
    for key, tensor in published.items():
        if key == "t_embedder.mlp.0.weight":
            torch.testing.assert_close(exported[key], tensor, rtol=0, atol=1e-7 * float(tensor.abs().max()))
        else:
            assert torch.equal(exported[key], tensor), key


@pytest.mark.parametrize(
    "config", [{}, {"qk_norm": True}, {"patch_size": 2}, {"ff_type": "gelu"}, {"norm_type": "layer_norm"}]
)
def test_round_trip(config):
    model = tiny_lightning_dit(**config)
    assert_round_trip(denoiser_table(LIGHTNINGDIT, model.config), model, rounded=("time_embedding.linear_1.weight",))
    exported = export_denoiser(model)
    assert denoiser_config(exported, LIGHTNINGDIT, 2) == {name: model.config[name] for name in public(model)}


def public(model):
    return [name for name in model.config if name[0] != "_"]


def published_shapes() -> dict[str, tuple[int, ...]]:
    """LightningDiT-XL/1: the keys and shapes of its file."""
    dim, linear = 1152, {}

    def add(name, rows, *columns):
        linear[f"{name}.weight"], linear[f"{name}.bias"] = (rows, *columns), (rows,)

    add("x_embedder.proj", dim, 32, 1, 1)
    add("t_embedder.mlp.0", dim, 256)
    add("t_embedder.mlp.2", dim, dim)
    add("final_layer.adaLN_modulation.1", 2 * dim, dim)
    add("final_layer.linear", 32, dim)
    for i in range(28):
        add(f"blocks.{i}.attn.qkv", 3 * dim, dim)
        add(f"blocks.{i}.attn.proj", dim, dim)
        add(f"blocks.{i}.mlp.w12", 6144, dim)
        add(f"blocks.{i}.mlp.w3", dim, 3072)
        add(f"blocks.{i}.adaLN_modulation.1", 6 * dim, dim)
        linear[f"blocks.{i}.norm1.weight"] = linear[f"blocks.{i}.norm2.weight"] = (dim,)
    tables = {"pos_embed": (1, 256, dim), "feat_rope.freqs_cos": (256, 72), "feat_rope.freqs_sin": (256, 72)}
    others = {"y_embedder.embedding_table.weight": (1001, dim), "final_layer.norm_final.weight": (dim,)}
    return {**linear, **others, **tables}


def test_published_size():
    """Every published key has its place in the preset, and every weight of the preset is filled."""
    shapes = published_shapes()
    assert len(shapes) == 351
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config = denoiser_config(state, LIGHTNINGDIT)
    preset = build_preset("lightningdit-xl-1", device="meta")
    assert config == {name: preset.config[name] for name in public(preset)}
    ours = denoiser_table(LIGHTNINGDIT, config).to_ours(state)
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in preset.state_dict().items()
    }
    assert sum(value.numel() for value in ours.values()) == 674_961_824


class TestBadInput:
    def test_other_families(self, oracle):
        with pytest.raises(
            ValueError, match="checkpoint must be of a DiT-like denoiser with the key 'x_embedder.proj"
        ):
            load_lightningdit(oracle("vavae") / "checkpoint.pt", None)

    def test_raw_weights_are_not_published(self, folder, tmp_path):
        content = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert not any(tensor.any() for name, tensor in content["model"].items() if name.startswith("blocks"))
        del content["ema"]
        torch.save(content, tmp_path / "raw.pt")
        with pytest.raises(ValueError, match="must hold averaged weights under 'ema'"):
            load_lightningdit(tmp_path / "raw.pt", None)

    def test_a_part_is_missing(self, folder, tmp_path):
        content = torch.load(folder / "checkpoint.pt", weights_only=True)
        del content["ema"]["blocks.1.mlp.w3.bias"]
        torch.save(content, tmp_path / "part.pt")
        with pytest.raises(ValueError, match="checkpoint must have the weight 'blocks.1.ff.net.2.bias'"):
            load_lightningdit(tmp_path / "part.pt", None)

    def test_models_without_a_published_layout(self):
        for config, message in (
            ({"sample_size": [2, 4]}, "checkpoint must have positions for a square grid, got 8"),
            ({"pos_embed_type": "learned"}, "model must hold only keys of the table, got 'pos_embed.table'"),
            (
                {"ff_type": "exact_gelu"},
                "model must have norm_type 'layer_norm' in its published layout, got 'rms_norm'",
            ),
            ({"pos_embed_type": "sincos_1d"}, "model must have sample_size .* in its published layout, got 4"),
        ):
            with pytest.raises(ValueError, match=message):
                export_denoiser(tiny_lightning_dit(**config))
