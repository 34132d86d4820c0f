"""One interface to every tokenizer."""

import pytest
import torch
from factories import (
    tiny_detok,
    tiny_drorae,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_identity_fae,
    tiny_kl,
    tiny_lightning_dit,
    tiny_maetok,
    tiny_raev2,
)

from hf_fae import AutoVisualTokenizer
from hf_fae.latents import latent_statistics


TOKENIZERS = {
    "FAE": tiny_fae,
    "features": tiny_identity_fae,
    "DRoRAE": tiny_drorae,
    "RAEv2": tiny_raev2,
    "l-DeTok": tiny_detok,
    "MAETok": tiny_maetok,
    "AutoencoderKL": lambda: tiny_kl(sample_size=32, scaling_factor=0.3, shift_factor=0.1),
}
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_tokenizer(name, tmp_path):
    vae = TOKENIZERS[name]().eval()
    vae.save_pretrained(tmp_path)
    tokenizer = AutoVisualTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer.vae) is type(vae)
    latents = tokenizer.encode(PIXELS).latent_dist.mode()
    assert tokenizer.latent_shape(32, 32) == tuple(latents.shape[1:])
    images = tokenizer.decode(latents).sample
    assert images.shape == PIXELS.shape
    own = vae.encode(PIXELS).latent_dist.mode()
    torch.testing.assert_close(images, vae.decode(own).sample, atol=1e-4, rtol=1e-3)
    if name == "AutoencoderKL":
        mean, std = latent_statistics(vae)
        torch.testing.assert_close(latents, (own - mean) / std, atol=1e-5, rtol=1e-5)
    if name in ("FAE", "features", "DRoRAE", "RAEv2"):
        assert tokenizer.decode_features(latents).shape == (2, 16, 32)
    else:
        with pytest.raises(ValueError, match="decode_features requires a tokenizer of features, got a Autoencoder"):
            tokenizer.decode_features(latents)


def test_the_tokenizer_of_a_pipeline_and_its_encoder(tmp_path):
    tiny_fae_dit_pipeline().save_pretrained(tmp_path / "pipeline")
    tiny_fae().image_encoder.save_pretrained(tmp_path / "encoder")
    tokenizer = AutoVisualTokenizer.from_pretrained(
        tmp_path / "pipeline", str(tmp_path / "encoder"), dtype=torch.bfloat16
    )
    assert tokenizer.vae.dtype == torch.bfloat16
    assert tokenizer.encode(PIXELS.bfloat16()).latent_dist.mode().shape == (2, 4, 4, 4)


def test_what_cannot_be_opened(tmp_path):
    tiny_lightning_dit().save_pretrained(tmp_path / "dit")
    tiny_fae(with_encoder=False).save_pretrained(tmp_path / "bare")
    for path, kwargs, message in (
        (tmp_path / "absent", {}, "pretrained_model_name_or_path .*absent.* cannot be loaded"),
        (tmp_path / "dit", {}, "must be a tokenizer of hf_fae, got a LightningDiTTransformer2DModel"),
        (tmp_path / "bare", {}, "comes without its frozen encoder and names none: pass image_encoder"),
        (tmp_path / "dit", {"files": "x"}, r"\['files'\] must not be given for"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoVisualTokenizer.from_pretrained(path, **kwargs)
    with pytest.raises(OSError, match="is made by"):
        AutoVisualTokenizer()
