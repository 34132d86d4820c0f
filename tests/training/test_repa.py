"""REPA by the scripts: on images, and on cached latents with cached features."""

import json

import pytest
import torch
from factories import tiny_fae, tiny_identity_fae
from training_runs import assert_equal_checkpoints, last

from hf_fae import FAEDiTPipeline


SCRIPT = ("train_generator", "smoke_generator.yaml")
EXACT = ["--mixed_precision", "no", "--checkpointing_steps", "2", "--repa_layer", "1"]


@pytest.fixture(scope="module")
def fae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fae")
    tiny_fae().save_pretrained(folder / "fae")
    tiny_identity_fae().save_pretrained(folder / "features")
    return folder


@pytest.fixture
def images(image_folder):
    return ["--dataset_name", str(image_folder), "--label_column", "label"]


@pytest.fixture
def caches(tmp_path, fae, images, train_here):
    for name in ("fae", "features"):
        flags = [*images, "--vae", str(fae / name)]
        train_here("cache_latents", "smoke_cache_latents.yaml", tmp_path / f"cached-{name}", *flags)
    return [str(tmp_path / f"cached-{name}") for name in ("fae", "features")]


def test_on_images(tmp_path, fae, images, encoder, train_here):
    flags = [*images, "--vae", str(fae / "fae"), *EXACT]
    train_here(*SCRIPT, tmp_path / "plain", *flags)
    repa = ["--repa_encoder", str(encoder)]
    train_here(*SCRIPT, tmp_path / "weightless", *flags, *repa, "--repa_weight", "0")
    train_here(*SCRIPT, tmp_path / "repa", *flags, *repa)
    pipes = [FAEDiTPipeline.from_pretrained(tmp_path / name) for name in ("plain", "weightless", "repa")]
    plain, weightless, aligned = (pipe.transformer.state_dict() for pipe in pipes)
    assert plain.keys() == aligned.keys()  # the projector is not saved
    assert all(torch.equal(value, weightless[name]) for name, value in plain.items())
    assert not torch.equal(plain["blocks.0.attn.to_q.weight"], aligned["blocks.0.attn.to_q.weight"])
    assert -1 <= last(tmp_path / "repa", "repa") <= 1
    train_here(*SCRIPT, tmp_path / "bf16", *flags, *repa, "--mixed_precision", "bf16", "--max_train_steps", "1")


def test_on_cached_latents_resumed_to_the_bit(tmp_path, caches, train_here):
    latents, features = caches
    flags = ["--dataset_name", latents, "--repa_features", features, *EXACT]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here(*SCRIPT, whole, *flags)
    train_here(*SCRIPT, parts, *flags, "--max_train_steps", "2")
    train_here(*SCRIPT, parts, *flags, "--resume_from_checkpoint", "latest")
    assert_equal_checkpoints(*(run / "checkpoint-4" for run in (whole, parts)))
    assert -1 <= last(whole, "repa") <= 1


def test_what_does_not_fit(tmp_path, fae, images, caches, encoder, train_here):
    latents, features = caches
    on_images = [*images, "--vae", str(fae / "fae")]
    for flags, message in (
        (["--dataset_name", latents, "--repa_encoder", str(encoder)], "None for cached latents: name repa_features"),
        ([*on_images, "--repa_features", features], "repa_features must be None for images: name repa_encoder"),
        (["--dataset_name", latents, "--repa_features", latents], "feature_cache must hold features"),
    ):
        with pytest.raises(ValueError, match=message):
            train_here(*SCRIPT, tmp_path / "run", *flags, *EXACT)
    index = tmp_path / "cached-features" / "index.json"
    content = json.loads(index.read_text())
    content["content"]["train"] = "others"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="repa_features .* must have the images of .*, got others"):
        train_here(*SCRIPT, tmp_path / "run", "--dataset_name", latents, "--repa_features", features, *EXACT)
