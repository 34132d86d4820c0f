"""The models in checkpoints/: they are small, and reconstruct as well as their cards say."""

from pathlib import Path

import torch
from datasets import load_dataset
from diffusers.image_processor import VaeImageProcessor

from hf_fae import AutoencoderFAE
from hf_fae.evaluation.reconstruction import feature_cosine, psnr
from hf_fae.training.pictures import center_crop, decode_image


CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


def test_size():
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file() and not path.is_symlink()]
    assert 20_000_000 < sum(path.stat().st_size for path in files) <= 48_000_000
    assert not any("image_encoder" in path.name for path in CHECKPOINTS.rglob("*"))


def test_tokenizer_reconstructs(assets):
    vae = AutoencoderFAE.from_pretrained(CHECKPOINTS / "fae-emoji-256", dtype=torch.float32)
    assert vae.image_encoder is None
    vae.load_encoder(assets / "dinov2-small")
    rows = load_dataset(str(assets / "fluent-emoji"), split="validation")
    pictures = [center_crop(decode_image(row["image"]), 256) for row in rows.select(range(0, len(rows), 28))]
    images = VaeImageProcessor(do_resize=False).preprocess(pictures)
    with torch.no_grad():
        features, grid = vae.extract_features(images)
        latents = vae.encode_features(features, grid).latent_dist.mode()
        assert psnr(vae.decode(latents).sample, images).mean() > 19
        assert feature_cosine(vae.decode_features(latents), features) > 0.97
    assert 0.8 < latents.std() < 1.2
