import shutil

import pytest
import torch
from factories import tiny_fae, tiny_rae
from safetensors.torch import load_file

from hf_fae import AutoencoderFAE
from hf_fae.training.tokenizer import add_fusion, load_rae, read_fusion_type, store_latent_statistics


@pytest.fixture(scope="module")
def fae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fae")
    tiny_fae().save_pretrained(folder)
    return folder


class TestStoredStatistics:
    def test_nothing_else_changes(self, tmp_path, fae):
        folder = shutil.copytree(fae, tmp_path / "fae")
        mean, std = torch.arange(4.0).view(4, 1, 1), torch.full((4, 1, 1), 3.0)
        store_latent_statistics(folder, mean, std)
        model, before = AutoencoderFAE.from_pretrained(folder), AutoencoderFAE.from_pretrained(fae)
        assert torch.equal(model.latents_mean, mean) and torch.equal(model.latents_std, std)
        for name, value in before.state_dict().items():
            assert name.startswith("latents_") or torch.equal(value, model.state_dict()[name])
        files = [sorted(path.relative_to(f) for path in f.rglob("*")) for f in (fae, folder)]
        assert files[0] == files[1]
        name = "diffusion_pytorch_model.safetensors"
        assert load_file(folder / name).keys() == load_file(fae / name).keys()

    def test_another_shape_or_no_weights(self, tmp_path, fae):
        folder = shutil.copytree(fae, tmp_path / "fae")
        with pytest.raises(ValueError, match=r"has shape \(4, 1, 1\), got \(5, 1, 1\)"):
            store_latent_statistics(folder, torch.zeros(5, 1, 1), torch.ones(5, 1, 1))
        with pytest.raises(ValueError, match="holds no weights with latents_mean and latents_std"):
            store_latent_statistics(tmp_path, torch.zeros(4, 1, 1), torch.ones(4, 1, 1))


class TestFusion:
    def test_keeps_encoder_and_decoder(self):
        rae = tiny_rae()
        model = add_fusion(rae, fusion_weight=0.3, expert_hidden_size=40)
        assert model.image_encoder is rae.image_encoder and model.config.fusion_layers == 3
        assert (model.config.fusion_weight, model.config.expert_hidden_size) == (0.3, 40)
        theirs = rae.decoder.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in model.decoder.state_dict().items())
        assert add_fusion(rae, 2).config.fusion_layers == 2
        with pytest.raises(ValueError, match="fusion_layers must be at most 3, the layers of the encoder, got 4"):
            add_fusion(rae, 4)

    def test_reading(self, tmp_path, fae):
        tiny_rae().save_pretrained(tmp_path / "rae")
        assert read_fusion_type(tmp_path / "rae") == "none"
        model = load_rae(str(tmp_path / "rae"), None, 32)
        assert model.image_encoder is not None and model.dtype == torch.float32
        with pytest.raises(ValueError, match="resolution must be that of the tokenizer, 32, got 64"):
            load_rae(str(tmp_path / "rae"), None, 64)
        with pytest.raises(ValueError, match="tokenizer must be an AutoencoderDRoRAE or .* got AutoencoderFAE in"):
            read_fusion_type(fae)
