"""All kinds of data are what the loop and the scripts ask for."""

import pytest
import torch
from accelerate import Accelerator
from factories import tiny_fae, tiny_identity_fae

from hf_fae.data.conditions import ClassData, PromptData
from hf_fae.data.encode_dataset import encode_dataset
from hf_fae.data.feature_cache import FeatureData
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.latent_cache import CachedLatents
from hf_fae.data.opening import latent_sample_size, open_training_data
from hf_fae.data.protocol import GeneratorData, TrainingData


@pytest.fixture(scope="module")
def images(parquet_folder):
    return ImageData(DataArguments(str(parquet_folder), resolution=32, label_column="kind"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("latents")
    encode_dataset(folder, tiny_identity_fae(), images, Accelerator(cpu=True), source="x")
    return CachedLatents(folder)


@pytest.fixture(params=["images", "latents", "features", "classes", "prompts"])
def data(request, images, latents):
    if request.param == "features":
        return FeatureData(images, str(latents.folder), tiny_fae())
    classes, prompts = ClassData(images, [3, 2, 1, 0]), PromptData(latents, "a dot")
    return {"images": images, "latents": latents, "classes": classes, "prompts": prompts}[request.param]


def test_training_data(data, images):
    assert isinstance(data, TrainingData)
    assert len(data) == 32 and data.signature(4, 2, 1) == images.signature(4)
    assert data.describe().count("32 rows") == 1
    assert data.facts().keys() == images.facts().keys() and data.facts()["resolution"] == 32
    whole, rest = data.batches(4), data.batches(4, images_seen=4)
    next(whole)
    assert torch.equal(next(whole)["row_ids"], next(rest)["row_ids"])
    assert [len(batch["row_ids"]) for batch in data.validation_batches(3)] == [3, 1]


def test_extended_batches(images, latents):
    labels = next(images.batches(8))["class_labels"]
    assert torch.equal(next(ClassData(images, [3, 2, 1, 0]).batches(8))["class_labels"], 3 - labels)
    assert next(PromptData(latents, "a dot").validation_batches(2))["captions"] == ["a dot"] * 2


def test_generator_data(images, latents):
    for data in (images, latents):
        assert isinstance(data, GeneratorData)
        assert data.class_names() == {0: "circle", 1: "cross", 2: "dot", 3: "ring"}
        assert data.text_encoder is None and not data.has_captions
    vae = latents.load_tokenizer(None)
    images.prepare_tokenizer(tiny_fae())
    assert latent_sample_size(images, vae) == latent_sample_size(latents, vae) == 4


def test_data_are_opened_by_name(images, latents):
    opened = open_training_data(DataArguments(str(latents.folder)), seed=3)
    assert isinstance(opened, CachedLatents) and opened.seed == 3
    assert isinstance(open_training_data(images.args, seed=0), ImageData)
