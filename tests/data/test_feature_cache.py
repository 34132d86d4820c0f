"""Images with cached features: they are those of the encoder, and a cache of something else is refused."""

import itertools
import shutil

import pytest
import torch
from accelerate import Accelerator
from factories import tiny_encoder, tiny_fae, tiny_identity_fae, tiny_kl

from hf_fae import AutoencoderFAE
from hf_fae.autoencoders.frozen_encoder import frozen_features
from hf_fae.data.encode_dataset import encode_dataset
from hf_fae.data.feature_cache import FeatureData
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.latent_cache import CachedLatents


def make_data(folder, seed=0, **kwargs):
    return ImageData(DataArguments(dataset_name=str(folder), resolution=32, **kwargs), seed)


def encode(folder, vae, data, features=None):
    settings = {"source": "x", "batch_size": 4, "rows_per_shard": 10, "features": features}
    encode_dataset(folder, vae, data, Accelerator(cpu=True), **settings)
    return str(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, parquet_folder):
    return encode(tmp_path_factory.mktemp("features"), tiny_identity_fae(), make_data(parquet_folder))


@pytest.mark.parametrize("flip", [True, False])
def test_features_are_those_of_the_images(cache, parquet_folder, flip):
    vae = tiny_fae()
    data = FeatureData(make_data(parquet_folder, seed=3, random_flip=flip), cache, vae)
    batches = list(itertools.islice(data.batches(8), 6))
    assert flip == any(batch["mirrored"].any() for batch in batches)
    for batch in batches:
        cached, grid = frozen_features(vae, batch)
        expected, expected_grid = frozen_features(vae, {"pixel_values": batch["pixel_values"]})
        assert grid == expected_grid == (4, 4)
        torch.testing.assert_close(cached, expected, rtol=2e-3, atol=5e-3)  # float16's rounding
    assert "features" not in next(data.validation_batches(2))


def test_latents_from_cached_features(tmp_path, cache, parquet_folder):
    """The moments are those of the images, up to float16's rounding of the features; images are not encoded."""
    data = make_data(parquet_folder)
    encode(tmp_path / "pictures", tiny_fae(), data)
    vae = tiny_fae()
    features = FeatureData(data, cache, vae)
    vae.image_encoder = None
    encode(tmp_path / "features", vae, data, features=features)
    ours, theirs = (CachedLatents(tmp_path / name) for name in ("features", "pictures"))
    assert ours.index["splits"] == theirs.index["splits"]
    for split in ("train", "validation"):
        rows = range(len(getattr(ours, split)))
        for mirror in (False, True) if split == "train" else (False,):
            read = [some.read(getattr(some, split), rows, [mirror] * len(rows)) for some in (ours, theirs)]
            assert torch.equal(read[0]["row_ids"], read[1]["row_ids"])
            torch.testing.assert_close(read[0]["moments"], read[1]["moments"], rtol=5e-3, atol=5e-3)


def test_rows_that_the_cache_leaves_out(cache, parquet_folder):
    data = FeatureData(make_data(parquet_folder), cache, tiny_fae())
    with pytest.raises(ValueError, match="feature_cache .* has no row 99 of 'validation'"):
        data.read("validation", [0, 99], [False, False])


def test_only_for_an_fae(cache, parquet_folder):
    with pytest.raises(ValueError, match="feature_cache requires an AutoencoderFAE, got a AutoencoderKL"):
        FeatureData(make_data(parquet_folder), cache, tiny_kl())


def test_it_is_the_data_in_all_else(cache, parquet_folder):
    pictures = make_data(parquet_folder, balance_column="number", label_column="kind")
    data = FeatureData(pictures, cache, tiny_fae())
    assert (len(data), data.signature(8), data.describe()) == (32, pictures.signature(8), pictures.describe())
    assert data.facts()["resolution"] == 32
    ours, theirs = (list(itertools.islice(some.batches(4, images_seen=8), 3)) for some in (data, pictures))
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(ours, theirs, strict=True))


def test_another_encoder(cache, parquet_folder):
    config = tiny_fae().config
    names = [name for name in config if name.startswith(("pixel", "decoder", "encoder", "latent", "sample", "patch"))]
    other = AutoencoderFAE.from_encoder(tiny_encoder("siglip"), **{name: config[name] for name in names})
    with pytest.raises(ValueError, match="whose image_encoder has the fingerprint"):
        FeatureData(make_data(parquet_folder), cache, other)


def test_latents_that_are_no_features(tmp_path, parquet_folder):
    folder = encode(tmp_path, tiny_fae(), make_data(parquet_folder))
    with pytest.raises(ValueError, match="feature_cache must hold features, .* got 'attention'"):
        FeatureData(make_data(parquet_folder), folder, tiny_fae())


def test_other_images(tmp_path, cache, parquet_folder, image_folder):
    with pytest.raises(ValueError, match="feature_cache .* has the features of other images"):
        FeatureData(make_data(image_folder), cache, tiny_fae())
    folder = tmp_path / "fewer"
    shutil.copytree(parquet_folder, folder)
    (folder / "train-00003-of-00004.parquet").unlink()
    with pytest.raises(ValueError, match="feature_cache .* has the features of other images"):
        FeatureData(make_data(folder), cache, tiny_fae())


@pytest.mark.parametrize("name, value", [("crop", "random"), ("resolution", 64), ("streaming", True)])
def test_images_cut_otherwise(cache, parquet_folder, name, value):
    data = ImageData(DataArguments(dataset_name=str(parquet_folder), **{"resolution": 32, name: value}))
    with pytest.raises(ValueError, match=f"{name} must be"):
        FeatureData(data, cache, tiny_fae())
