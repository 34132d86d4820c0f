"""Latents of tiny tokenizers."""

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from evaluations import read_report, run, run_in_two_processes
from factories import tiny_fae, tiny_kl, tiny_maetok
from PIL import Image

from hf_fae.evaluation.metrics.latent_space import channel_moments, power_spectrum
from hf_fae.evaluation.tasks.latent_analysis import choose_rows, pixel_patches
from hf_fae.latents import encode_images


SPACES = ["latents", "pixels", "features_pca"]


@pytest.fixture
def options(tokenizer_folder, data_folder, tmp_path):
    """A run that works."""
    return {
        "model": tokenizer_folder,
        "output_dir": tmp_path / "out",
        "dataset_name": data_folder,
        "components": [1, 2, 4],
        "batch_size": 16,
    }


def read_pixels(data_folder, split, numbers):
    rows = load_dataset(str(data_folder), split=split).select(numbers)
    return torch.stack([torch.from_numpy(np.array(row["image"])) for row in rows]).permute(0, 3, 1, 2) / 127.5 - 1


def test_the_numbers_are_those_of_the_pictures(options, data_folder):
    result = run("latents", **options)
    details = result.details
    assert details["shapes"] == {"latents": [4, 4, 4], "pixels": [3, 4, 4], "features_pca": [4, 4, 4]}
    assert details["dimension"] == 2  # the classes' colours
    assert all(0.9 < share < 1 for share in details["explained_variance"].values())
    assert details["damaged"] == {"train": 0, "held_out": 1}
    vae, train = tiny_fae(), read_pixels(data_folder, "train", range(90))
    held_out = read_pixels(data_folder, "validation", [number for number in range(70) if number != 40])
    with torch.no_grad():
        latents, held_out_latents = (vae.encode(pixels).latent_dist.mode() for pixels in (train, held_out))
        features = vae.extract_features(train)[0]
    assert details["channels"]["latents"]["mean"] == pytest.approx(channel_moments(latents)["mean"], abs=1e-4)
    small = held_out.unflatten(3, (4, 8)).unflatten(2, (4, 8)).mean((3, 5))
    for name, space in (("latents", held_out_latents), ("pixels", small)):
        assert details["spectra"][name]["power"] == pytest.approx(power_spectrum(space)["power"], rel=1e-3, abs=1e-6)
    # Principal components: the widths are singular values of the tokens, the axes are uncorrelated.
    tokens = features.flatten(0, 1).double()
    expected = torch.linalg.svdvals(tokens - tokens.mean(0))[:4] / len(tokens) ** 0.5
    assert details["channels"]["features_pca"]["std"] == pytest.approx(expected.tolist(), rel=1e-3)
    assert details["channels"]["features_pca"]["mean"] == pytest.approx([0] * 4, abs=1e-4)
    # One component of whitened data is a standard Gaussian, in every space.
    for name in SPACES:
        first = details["mixtures"][name][0]
        assert first["nll"] / 2 == pytest.approx(0.5 * (1 + np.log(2 * np.pi)), abs=1e-4)
        nlls = [point["nll"] for point in details["mixtures"][name]]
        assert nlls == sorted(nlls, reverse=True)
        assert result.metrics[f"nll_{name}"] == pytest.approx(nlls[-1] / 2)
    last = {name: result.metrics[f"nll_{name}"] for name in SPACES}
    assert details["easiest_first"]["nll"]["4"] == sorted(SPACES, key=last.get)
    assert "denoising_loss" not in details["easiest_first"]


def test_plots_report_and_denoiser(options):
    result = run("latents", **options, denoising_steps=2)
    report = read_report(options["output_dir"])
    assert report["metrics"] == result.metrics and report["details"] == result.details
    for name in ("nll", "spectrum", "channels", "denoising"):
        assert min(Image.open(options["output_dir"] / f"{name}.png").size) > 300
    losses = {name: result.metrics[f"denoising_loss_{name}"] for name in SPACES}
    assert all(1 < loss < 3 for loss in losses.values())
    assert result.details["easiest_first"]["denoising_loss"] == sorted(SPACES, key=losses.get)


@pytest.mark.slow
def test_interrupted_and_shared_runs_end_alike(processes, options, tmp_path):
    options["denoising_steps"] = 1
    metrics = run("latents", **options).metrics
    for name in ("report.json", "parts/mixtures_pixels.json", "parts/denoising_latents.json"):
        (options["output_dir"] / name).unlink()
    next((options["output_dir"] / "parts" / "train").iterdir()).unlink()
    assert run("latents", **options).metrics == metrics
    run_in_two_processes(processes, "latents", **options | {"output_dir": tmp_path / "two"})
    assert read_report(tmp_path / "two")["metrics"] == metrics


def test_pixel_patches_are_small_pictures_cut_up():
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(pixel_patches(images, (16, 16), 3), images)
    shapes = {channels: pixel_patches(images, (4, 4), channels).shape for channels in (1, 4, 12, 32, 48)}
    assert {channels: shape[1] for channels, shape in shapes.items()} == {1: 3, 4: 3, 12: 12, 32: 27, 48: 48}
    patches = pixel_patches(images, (4, 4), 12)
    small = images.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
    torch.testing.assert_close(patches.view(2, 3, 2, 2, 4, 4)[:, 1, 0, 1], small[:, 1, 0::2, 1::2])


def test_rows_are_chosen_from_all_classes_alike():
    labels = [0] * 50 + [1] * 30 + [2] * 4
    rows = Dataset.from_dict({"label": labels})
    chosen = choose_rows(rows, "label", 24, seed=0)
    assert chosen == sorted(set(chosen)) and chosen == choose_rows(rows, "label", 24, seed=0)
    assert np.bincount([labels[number] for number in chosen]).tolist() == [10, 10, 4]
    assert choose_rows(rows, "label", 24, seed=1) != chosen
    assert choose_rows(rows, None, 500, seed=0) == list(range(84))
    assert len(choose_rows(rows, None, 24, seed=0)) == 24


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"components": [5, 91]}, r"components must be at most the 90 training images, got \[5, 91\]"),
        ({"components": [5], "max_train_samples": 4}, "components must be at most the 4 training images"),
        ({"components": [0]}, r"components must be positive numbers, got \[0\]"),
        ({"max_dimension": 0}, "max_dimension must be at least 1, got 0"),
        ({"max_train_samples": 0}, "max_train_samples must be at least 1, got 0"),
        ({"denoising_steps": -1}, "denoising_steps must not be negative, got -1"),
    ],
)
def test_bad_arguments(options, changed, message):
    with pytest.raises(ValueError, match=message):
        run("latents", **options | changed)
    assert not options["output_dir"].exists()


@pytest.mark.parametrize("make, shape, pixels", [(tiny_maetok, [4, 1, 6], [3, 4, 4]), (tiny_kl, [4, 4, 4], [3, 4, 4])])
def test_a_tokenizer_without_features(options, tmp_path, data_folder, make, shape, pixels):
    """Latents and pixels alone; in a row the latents have no places in the picture, but it has its patches."""
    make().save_pretrained(tmp_path / "model")
    result = run("latents", **options | {"model": tmp_path / "model", "denoising_steps": 1})
    assert result.details["shapes"] == {"latents": shape, "pixels": pixels}
    kinds = ("nll", "held_out_nll", "effective_rank", "denoising_loss")
    assert set(result.metrics) == {f"{kind}_{name}" for kind in kinds for name in ("latents", "pixels")}
    latents = encode_images(make(), read_pixels(data_folder, "train", range(90))).mode().detach()
    assert result.details["channels"]["latents"]["mean"] == pytest.approx(channel_moments(latents)["mean"], abs=1e-4)
