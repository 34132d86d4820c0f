"""Patches of tiny tokenizers."""

import numpy as np
import pytest
import torch
from evaluations import read_report, run, run_in_two_processes
from factories import tiny_fae, tiny_kl
from PIL import Image

from hf_fae.evaluation.metrics.patch_similarity import map_agreement, nearest_patches, object_mask


@pytest.fixture
def options(tokenizer_folder, data_folder, tmp_path):
    """A run that works."""
    return {
        "model": tokenizer_folder,
        "output_dir": tmp_path / "out",
        "dataset_name": data_folder,
        "rows": [0, 1, 2, 9],
        "batch_size": 16,
    }


def read_spaces(data_folder, numbers):
    """Features, features given back and latents (B, N, C) of rows of the validation split."""
    from datasets import load_dataset

    rows = load_dataset(str(data_folder), split="validation").select(numbers)
    pixels = torch.stack([torch.from_numpy(np.array(row["image"])) for row in rows]).permute(0, 3, 1, 2) / 127.5 - 1
    vae = tiny_fae()
    with torch.no_grad():
        features, _ = vae.extract_features(pixels)
        latents = vae.encode(pixels).latent_dist.mode()
        return features, vae.decode_features(latents), latents.flatten(2).mT


def test_the_numbers_are_those_of_the_pictures(options, data_folder):
    result = run("matching", **options)
    features, given_back, latents = read_spaces(data_folder, [number for number in range(70) if number != 40])
    cosines = torch.cosine_similarity(features, given_back, dim=-1).flatten()
    assert result.metrics["token_cosine"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    below = (cosines < result.metrics["token_cosine_p5"]).double().mean().item()
    assert below == pytest.approx(0.05, abs=0.005)
    for name, space in (("latents", latents), ("reconstruction", given_back)):
        expected = map_agreement(space, features).mean().item()
        assert result.metrics[f"map_correlation_{name}"] == pytest.approx(expected, abs=1e-5)

    features, given_back, latents = read_spaces(data_folder, options["rows"])
    masks = object_mask(features, (4, 4))
    masks[~masks.any(1)] = True
    alike = []
    for first in (0, 2):
        places = [
            nearest_patches(space[first], space[first + 1], masks[first + 1])[1] for space in (features, latents)
        ]
        for patch in masks[first].nonzero().flatten():
            (row, column), (other_row, other_column) = (divmod(int(place[patch]), 4) for place in places)
            alike.append(abs(row - other_row) <= 1 and abs(column - other_column) <= 1)
    assert result.metrics["match_agreement_latents"] == pytest.approx(np.mean(alike))
    assert [picture["object_patches"] for picture in result.details["pictures"]] == masks.sum(1).tolist()
    assert result.details["damaged"] == 1 and result.details["grid"] == [4, 4]
    for picture, mask in zip(result.details["pictures"], masks, strict=True):
        assert mask[picture["query"]]


def test_sheets_and_report(options):
    result = run("matching", **options, caption_column="caption")
    report = read_report(options["output_dir"])
    assert report["metrics"] == result.metrics and report["settings"]["rows"] == options["rows"]
    for name in ("similarity.png", "matches.png"):
        picture = Image.open(options["output_dir"] / name)
        assert min(picture.size) > 300
        assert len(np.unique(np.array(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 1000


def test_a_picture_matches_itself(options):
    result = run("matching", **options | {"rows": [5, 5]})
    assert result.metrics["match_agreement_latents"] == result.metrics["match_agreement_reconstruction"] == 1
    assert 0 < result.details["pairs"][0]["by_chance"] <= 1


@pytest.mark.slow
def test_interrupted_and_shared_runs_end_alike(processes, options, tmp_path):
    metrics = run("matching", **options).metrics
    (options["output_dir"] / "report.json").unlink()
    parts = sorted((options["output_dir"] / "parts" / "images").iterdir())
    assert len(parts) == 3
    parts[1].unlink()
    assert run("matching", **options).metrics == metrics
    run_in_two_processes(processes, "matching", **options | {"output_dir": tmp_path / "two"})
    assert read_report(tmp_path / "two")["metrics"] == pytest.approx(metrics, abs=1e-5)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"rows": [0, 1, 2]}, r"rows must be pairs of images, got \[0, 1, 2\]"),
        ({"rows": [0, 70]}, "rows must be from 0 to 69, got 70"),
        ({"rows": [40, 1]}, "rows must be images that can be read, got 40"),
        ({"dataset_name": None}, "dataset_name must name the images"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(options, changed, message):
    with pytest.raises(ValueError, match=message):
        run("matching", **options | changed)
    assert not options["output_dir"].exists()


def test_a_tokenizer_without_features(options, tmp_path):
    tiny_kl().save_pretrained(tmp_path / "kl")
    with pytest.raises(ValueError, match="must reconstruct features, got a AutoencoderKL, which does not"):
        run("matching", **options | {"model": tmp_path / "kl"})
    assert not options["output_dir"].exists()
