"""Saving that lets go of the weights: what is written is what `save_pretrained` writes."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from factories import tiny_drorae, tiny_fae_dit_pipeline
from safetensors.torch import load_file

from hf_fae import AutoencoderDRoRAE
from hf_fae.convert import saving
from hf_fae.convert.saving import consume


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_pipeline(tmp_path):
    pipe = tiny_fae_dit_pipeline()
    pipe.save_pretrained(tmp_path / "usual")
    consume(pipe, tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "usual")
    for name in files(tmp_path / "ours"):
        ours, usual = tmp_path / "ours" / name, tmp_path / "usual" / name
        if name.endswith("json"):
            assert json.loads(ours.read_text()) == json.loads(usual.read_text())
        else:
            state, expected = load_file(ours), load_file(usual)
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    assert all(buffer.is_meta for buffer in (pipe.vae.latents_mean, pipe.vae.latents_std))


def test_encoder_and_dtype(tmp_path):
    vae = tiny_drorae()
    vae.set_latent_statistics(torch.full_like(vae.latents_mean, 1 / 3), torch.full_like(vae.latents_std, 1.7))
    latents = torch.randn(1, vae.config.latent_channels, *vae.latent_size(32, 32))
    expected = vae.decode(latents).sample
    consume(vae, tmp_path, torch.bfloat16)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {str(tensor.dtype) for name, tensor in state.items() if "latents" not in name} == {"torch.bfloat16"}
    loaded = AutoencoderDRoRAE.from_pretrained(tmp_path)
    assert loaded.image_encoder is not None
    assert (loaded.latents_mean == torch.tensor(1 / 3)).all()
    torch.testing.assert_close(loaded.decode(latents).sample, expected, atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("error")
def test_shards(tmp_path, monkeypatch):
    pipe = tiny_fae_dit_pipeline()
    expected = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    monkeypatch.setattr(saving, "SHARD_SIZE", max(tensor.nbytes for tensor in expected.values()))
    consume(pipe, tmp_path)
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    loaded = DiffusionPipeline.from_pretrained(tmp_path).transformer.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
