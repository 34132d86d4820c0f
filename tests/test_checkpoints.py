"""The models in checkpoints/: they are small, reconstruct as their cards say, and generate what they are told to."""

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch.nn import functional as F

from hf_fae import AutoencoderFAE
from hf_fae.data.decoding import center_crop, decode_image
from hf_fae.utils.image_metrics import feature_cosine, psnr


CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
# Class -> a caption of it.
CLASSES = {
    "face-smiling": "grinning face",
    "heart": "blue heart",
    "person": "girl",
    "time": "clock face six oclock",
    "food-fruit": "red apple",
    "transport-ground": "bus",
    "country-flag": "austria flag",
    "zodiac": "leo",
}


def read(rows) -> torch.Tensor:
    return VaeImageProcessor(do_resize=False).preprocess(
        [center_crop(decode_image(row["image"]), 256) for row in rows]
    )


def test_size():
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file() and not path.is_symlink()]
    assert 20_000_000 < sum(path.stat().st_size for path in files) <= 64_000_000
    assert not any("image_encoder" in path.name for path in CHECKPOINTS.rglob("*"))


@pytest.fixture(scope="module")
def tokenizer(assets) -> AutoencoderFAE:
    """The one of all pipelines, with its frozen encoder."""
    vae = AutoencoderFAE.from_pretrained(CHECKPOINTS / "fae-emoji-256", dtype=torch.float32)
    assert vae.image_encoder is None
    vae.load_encoder(assets / "dinov2-small")
    return vae


@pytest.fixture(scope="module")
def class_features(assets, tokenizer) -> torch.Tensor:
    """(classes, width): the mean of what the frozen encoder sees in eight images of each class."""
    rows = load_dataset(str(assets / "fluent-emoji"), split="train")
    subgroups = list(rows["subgroup"])
    means = []
    for label in CLASSES:
        number = rows.features["subgroup"].str2int(label)
        places = [place for place, subgroup in enumerate(subgroups) if subgroup == number]
        means.append(pooled(tokenizer, read(rows.select(places[:: -(-len(places) // 8)]))).mean(0))
    return torch.stack(means)


@torch.no_grad()
def pooled(tokenizer, images: torch.Tensor) -> torch.Tensor:
    return F.normalize(tokenizer.extract_features(images)[0].mean(1), dim=-1)


def test_tokenizer_reconstructs(assets, tokenizer):
    rows = load_dataset(str(assets / "fluent-emoji"), split="validation")
    images = read(rows.select(range(0, len(rows), 56)))
    with torch.no_grad():
        features, grid = tokenizer.extract_features(images)
        latents = tokenizer.encode_features(features, grid).latent_dist.mode()
        assert psnr(tokenizer.decode(latents).sample, images).mean() > 20
        assert feature_cosine(tokenizer.decode_features(latents), features) > 0.97
    assert 0.8 < latents.std() < 1.2


@pytest.mark.parametrize("name", ["fae-dit-emoji-256", "fae-starflow-emoji-256", "fae-text-emoji-256"])
def test_pipeline_generates_what_it_is_told(assets, tokenizer, class_features, name):
    """In the features of the frozen encoder, samples are nearest to images of their own class, of eight classes."""
    pipe = DiffusionPipeline.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 8} if "num_inference_steps" in pipe.config else {}
    generators = [torch.Generator().manual_seed(seed) for seed in range(2 * len(CLASSES))]
    if pipe.reads_text:
        assert pipe.text_encoder is None
        pipe.load_text_encoder(assets / "all-minilm-l6-v2")
    wanted = list(CLASSES.values() if pipe.reads_text else CLASSES)
    samples = pipe(2 * wanted, generator=generators, output_type="pt", **steps).images
    assert samples.shape == (16, 3, 256, 256)
    nearest = (pooled(tokenizer, 2 * samples - 1) @ class_features.T).argmax(-1)
    assert (nearest == torch.arange(8).repeat(2)).float().mean() >= 0.4  # chance: 0.125
