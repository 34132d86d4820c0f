"""The models in checkpoints/: they are small, draw without a network, and reconstruct as well as their cards say."""

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from hf_fae import AutoencoderFAE
from hf_fae.evaluation.reconstruction import feature_cosine, psnr
from hf_fae.training.pictures import center_crop, decode_image


CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
PIPELINES = ["fae-dit-emoji-256", "fae-starflow-emoji-256"]


def test_size():
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) <= 48_000_000
    assert not any("image_encoder" in path.name for path in CHECKPOINTS.rglob("*"))


@pytest.mark.parametrize("name", PIPELINES)
def test_draws(name):
    """What a few steps give is a picture of one thing on white."""
    pipe = DiffusionPipeline.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 10} if hasattr(pipe, "scheduler") else {}
    images = pipe(["heart"], generator=torch.Generator().manual_seed(0), output_type="pt", **steps).images
    assert images.shape == (1, 3, 256, 256)
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 0.9 and images[:, :, 64:192, 64:192].mean() < 0.9


def test_reconstructs(assets):
    vae = AutoencoderFAE.from_pretrained(CHECKPOINTS / PIPELINES[0], subfolder="vae", dtype=torch.float32)
    vae.load_encoder(assets / "dinov2-small")
    rows = load_dataset(str(assets / "fluent-emoji"), split="validation")
    pictures = [center_crop(decode_image(row["image"]), 256) for row in rows.select(range(0, len(rows), 42))]
    images = VaeImageProcessor(do_resize=False).preprocess(pictures)
    with torch.no_grad():
        features, grid = vae.extract_features(images)
        latents = vae.encode_features(features, grid).latent_dist.mode()
        assert psnr(vae.decode(latents).sample, images).mean() > 19
        assert feature_cosine(vae.decode_features(latents), features) > 0.95
    assert abs(latents.std() - 1) < 0.2
