import shutil

import pytest
import torch
from factories import tiny_fae
from safetensors.torch import load_file

from hf_fae import AutoencoderFAE
from hf_fae.data.statistics import store_latent_statistics


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
