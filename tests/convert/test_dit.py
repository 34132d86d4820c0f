"""DiT from its authors' layout and from diffusers', and l-DeTok's DiT."""

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from factories import tiny_dit
from parity import arrays, assert_parity, assert_round_trip
from safetensors.torch import save_file

from hf_fae import build_preset
from hf_fae.convert.denoisers import DETOK_DIT, DIT, denoiser_config, denoiser_table, export_denoiser
from hf_fae.convert.dit import diffusers_dit_config, diffusers_dit_table, load_detok_dit, load_dit


SIZES = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}


def diffusers_dit(**config) -> DiTTransformer2DModel:
    """diffusers' DiT; all blocks embed time and class by the same weights, as its converted ones do."""
    model = DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=10, **SIZES | config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model of diffusers, and the file of its weights."""
    path = tmp_path_factory.mktemp("dit") / "diffusion_pytorch_model.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers_dit()
    save_file(model.state_dict(), path)
    return model, path


INPUTS = torch.linspace(-2, 2, 768).view(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([1, 5, 10])


@torch.no_grad()
def test_diffusers(published):
    """Its sinusoids with the published code's frequencies, those of training; at time 0 its own are the same."""
    model, path = published
    ours = load_dit(path, None, sample_size=8, num_attention_heads=4).transformer
    assert_parity(ours(*(one[:1] for one in INPUTS)).sample, model(*(one[:1] for one in INPUTS)).sample)
    sinusoids = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj = sinusoids
    assert_parity(ours(*INPUTS).sample, model(*INPUTS).sample)


@torch.no_grad()
def test_authors_layout(published, tmp_path):
    """The same model, exported and loaded."""
    ours = load_dit(published[1], None, sample_size=8, num_attention_heads=4).transformer
    exported = export_denoiser(ours)
    assert exported["final_layer.linear.weight"].shape == (2 * 2 * 8, 64)
    rows = exported["final_layer.linear.weight"].view(2, 2, 8, 64), published[0].proj_out_2.weight.view(2, 2, 8, 64)
    assert torch.equal(*rows)  # (p1, p2, channel) in both
    torch.save(exported, tmp_path / "DiT.pt")
    again = load_dit(tmp_path / "DiT.pt", None, num_attention_heads=4).transformer
    assert public(again) == public(ours)
    assert torch.equal(again(*INPUTS).sample, ours(*INPUTS).sample)


@torch.no_grad()
def test_detok(oracle):
    """With exact GELU."""
    io = arrays(oracle("detok_dit") / "oracle.npz")
    model = load_detok_dit(oracle("detok_dit") / "checkpoint.pt", None, num_attention_heads=4).transformer
    assert_parity(model(io["x"], io["timestep"], io["y"]).sample, io["eps_and_variance"])


def test_pipeline(published):
    guidance = {"intervals": [[0, 1, 4.0]], "channels": 3}
    pipe = load_dit(published[1], None, 8, 4, torch.bfloat16, guidance_scale=guidance, num_inference_steps=3)
    assert isinstance(pipe.scheduler, DDPMScheduler) and pipe.scheduler.config.beta_schedule == "linear"
    assert pipe.scheduler.config.variance_type == "learned_range" and pipe.transformer.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    assert pipe.guidance.channels == 3
    assert pipe(1, output_type="latent").images.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("layout, config", [(DIT, {"patch_size": 2}), (DETOK_DIT, {"ff_type": "exact_gelu"})])
def test_round_trip(layout, config):
    model = tiny_dit(**config)
    assert_round_trip(denoiser_table(layout, model.config), model)


def public(model) -> dict:
    return {name: value for name, value in model.config.items() if name[0] != "_"}


@pytest.mark.parametrize("name, sample_size", [("dit-xl-2", 32), ("dit-xl-2-512", 64)])
def test_published_size_of_diffusers(name, sample_size):
    """`facebook/DiT-XL-2-256` and its like: the class and its defaults."""
    with torch.device("meta"):
        state = DiTTransformer2DModel(out_channels=8, sample_size=sample_size).state_dict()
    config, preset = diffusers_dit_config(state, sample_size), build_preset(name, device="meta")
    assert config == {key: preset.config[key] for key in config}
    ours = diffusers_dit_table(2, 4).to_ours(state)
    assert {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in preset.state_dict().items()}


@pytest.mark.parametrize("name, layout", [("dit-xl-2", DIT), ("dit-xl-2-512", DIT), ("dit-b-1-detok", DETOK_DIT)])
def test_published_size(name, layout):
    preset = build_preset(name, device="meta")
    published = export_denoiser(preset)
    assert denoiser_config(published, layout) == public(preset)
    ours = denoiser_table(layout, preset.config).to_ours(published)
    assert {key: value.shape for key, value in ours.items()} == {k: v.shape for k, v in preset.state_dict().items()}


def test_other_families(oracle):
    with pytest.raises(ValueError, match="checkpoint must be of a DiT-like denoiser with the key 'x_embedder.proj"):
        load_dit(oracle("maetok_sit") / "checkpoint.pt", None)
    with pytest.raises(ValueError, match="checkpoint must have tensors of the shapes of its family"):
        load_dit(oracle("repa_sit") / "checkpoint.pt", None, num_attention_heads=4)  # no variance
