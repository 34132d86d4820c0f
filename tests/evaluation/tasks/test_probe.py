"""The task `probe` on tiny models and pictures in three colours."""

import json

import pytest
import torch
from factories import TINY_VISION_CONFIGS, tiny_encoder, tiny_fae, tiny_kl, tiny_maetok
from transformers import Dinov2Config, Dinov2ForImageClassification

from hf_fae.evaluation.inputs.numbered_images import ImageArguments, NumberedImages
from hf_fae.evaluation.inputs.spaces import token_spaces
from hf_fae.evaluation.metrics.classifiers import knn_accuracy, linear_probe, pool_tokens, standard_error
from hf_fae.evaluation.tasks.probe import ProbeArguments, evaluate_probe
from hf_fae.latents import encode_images


@pytest.fixture
def options(tokenizer_folder, tmp_path):
    """A run that works."""
    return {
        "model": str(tokenizer_folder),
        "output_dir": str(tmp_path / "out"),
        "batch_size": 16,
        "neighbours": [3, 10, 200],
        "probe_steps": 20,
        "probe_batch_size": 32,
    }


@pytest.fixture
def pictures(data_folder):
    return ImageArguments(dataset_name=str(data_folder), label_column="label")


def read(pictures, split):
    """The good pictures and their classes."""
    source = NumberedImages(pictures.open(32, 0, "train"), split)
    batch = source.read(range(len(source)))
    return batch["images"][batch["is_good"]], batch["class_labels"][batch["is_good"]]


def save_classifier(folder, classes=3, **config):
    """DINOv2's classifier on the tiny tokenizer's own encoder."""
    config = {**TINY_VISION_CONFIGS["dinov2"], **config}
    torch.manual_seed(0)
    model = Dinov2ForImageClassification(Dinov2Config(num_labels=classes, **config)).eval()
    if model.config.hidden_size == 32:
        model.dinov2.load_state_dict(tiny_encoder().model.state_dict())
    model.save_pretrained(folder)
    return model


def test_the_numbers_are_those_of_the_features(options, pictures, tmp_path):
    result = evaluate_probe(ProbeArguments(**options), pictures)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metrics"] == result.metrics
    assert set(result.metrics) == {
        f"{kind}_{name}" for kind in ("knn", "linear") for name in ("features", "reconstruction", "latents")
    }
    assert result.details["samples"] == {"train": 90, "validation": 69}
    assert result.details["damaged"] == {"train": 0, "validation": 1}
    assert result.details["largest_class"] == 24 / 69

    vae = tiny_fae()
    (images, labels), (shown, targets) = (read(pictures, split) for split in ("train", "validation"))
    (train, grid), (validation, _) = token_spaces(vae, images), token_spaces(vae, shown)
    for name in train:
        poolings = ["mean", "quadrants", "flatten"] if name == "latents" else ["mean", "quadrants"]
        assert list(result.details["knn"][name]) == list(result.details["linear"][name]) == poolings
        pooled = [{p: pool_tokens(space[name], grid, p) for p in poolings} for space in (train, validation)]
        for pooling in poolings:
            expected = knn_accuracy(pooled[0][pooling], labels, pooled[1][pooling], targets, k=(3, 10))
            assert result.details["knn"][name][pooling] == pytest.approx(expected, abs=1.1 / 69)
        probe = linear_probe(pooled[0], labels, pooled[1], targets, steps=20, batch_size=32)
        assert result.metrics[f"linear_{name}"] == pytest.approx(probe.accuracy, abs=1.1 / 69)
        chosen = result.details["chosen"][name]
        best = max(result.details["knn"][name]["mean"].values())
        assert result.metrics[f"knn_{name}"] == best
        assert result.details["knn"][name][chosen["knn"]["pooling"]][chosen["knn"]["k"]] == best
        error = result.details["standard_errors"][f"knn_{name}"]
        assert error == standard_error(best, 69)
    assert result.metrics["knn_features"] > 0.9  # the colours are seen by any network


@pytest.mark.parametrize("make", [tiny_maetok, tiny_kl])
def test_a_tokenizer_without_features(options, pictures, tmp_path, make):
    make().save_pretrained(tmp_path / "model")
    result = evaluate_probe(ProbeArguments(**options | {"model": str(tmp_path / "model")}), pictures)
    assert set(result.metrics) == {"knn_latents", "linear_latents"}
    pooled = []
    for split in ("train", "validation"):
        images, labels = read(pictures, split)
        with torch.no_grad():
            latents = encode_images(make(), images / 127.5 - 1).mode()
        pooled += [{"flatten": latents.flatten(2).mT.flatten(1)}, labels]
    probe = linear_probe(*pooled, steps=20, batch_size=32)
    assert max(result.details["linear"]["latents"]["flatten"].values()) == pytest.approx(probe.accuracy, abs=1.1 / 69)


def test_the_released_classifier(options, pictures, tmp_path):
    model = save_classifier(tmp_path / "classifier")
    result = evaluate_probe(ProbeArguments(**options, classifier=str(tmp_path / "classifier")), pictures)
    images, labels = read(pictures, "validation")
    vae = tiny_fae()
    pixel_values = vae.image_encoder.preprocess(images / 127.5 - 1, (32, 32))
    with torch.no_grad():
        states = model.dinov2(pixel_values).last_hidden_state
        predicted = model(pixel_values).logits.argmax(1)
        given_back = token_spaces(vae, images)[0]["reconstruction"].mean(1)
        of_given_back = model.classifier(torch.cat([states[:, 0], given_back], dim=1)).argmax(1)
    expected = {"features": predicted, "reconstruction": of_given_back}
    for name, prediction in expected.items():
        accuracy = (prediction == labels).double().mean().item()
        assert result.metrics[f"released_head_{name}"] == pytest.approx(accuracy, abs=1e-7)
    assert "released_head_latents" not in result.metrics


def test_interrupted_runs_go_on_to_the_same_result(options, pictures, tmp_path):
    first = evaluate_probe(ProbeArguments(**options), pictures)
    report = (tmp_path / "out" / "report.json").read_bytes()
    (tmp_path / "out" / "report.json").unlink()
    part = sorted((tmp_path / "out" / "parts" / "train").iterdir())[1]
    part.unlink()
    kept = sorted((tmp_path / "out" / "parts" / "validation").iterdir())[0].stat().st_mtime_ns
    assert evaluate_probe(ProbeArguments(**options), pictures).metrics == first.metrics
    assert part.exists() and (tmp_path / "out" / "report.json").read_bytes() == report
    assert sorted((tmp_path / "out" / "parts" / "validation").iterdir())[0].stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="another probe_steps, 20, got 21"):
        evaluate_probe(ProbeArguments(**options | {"probe_steps": 21}), pictures)


@pytest.mark.parametrize(
    ("changed", "of_pictures", "message"),
    [
        ({}, {"label_column": None}, "label_column must name the classes to tell apart, got None"),
        ({}, {"label_column": "absent"}, "has no column 'absent'"),
        ({}, {"dataset_name": None}, "dataset_name must name"),
        ({"train_split": "validation"}, {}, "train_split .* must be disjoint from split, got 'validation'"),
        ({"neighbours": [91]}, {}, r"neighbours must be at most the 90 training images, got \[91\]"),
        ({"neighbours": [0]}, {}, r"neighbours must be positive numbers, got \[0\]"),
        ({"probe_steps": 0}, {}, "probe_steps must be at least 1, got 0"),
        ({"classifier": "absent/folder/here"}, {}, "classifier 'absent/folder/here' is not a local folder"),
        ({"classifier": "of five"}, {}, "must have the 3 classes of label_column 'label', got 5"),
        ({"classifier": "narrow"}, {}, "a dinov2 of width 32, got a dinov2 of width 16"),
        ({"classifier": "headless"}, {}, "must have trained weights, but lacks classifier.bias"),
        ({"model": "kl", "classifier": "headless"}, {}, "classifier must be None for a AutoencoderKL, which has no"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(options, pictures, tmp_path, changed, of_pictures, message):
    made = {
        "of five": lambda folder: save_classifier(folder, classes=5),
        "narrow": lambda folder: save_classifier(folder, hidden_size=16),
        "headless": lambda folder: tiny_encoder().save_pretrained(folder),
        "kl": lambda folder: tiny_kl().save_pretrained(folder),
    }
    for name, value in changed.items():
        if isinstance(value, str) and value in made:
            made[value](tmp_path / value)
            changed = {**changed, name: str(tmp_path / value)}
    for name, value in of_pictures.items():
        setattr(pictures, name, value)
    with pytest.raises(ValueError, match=message):
        evaluate_probe(ProbeArguments(**options | changed), pictures)
    assert not (tmp_path / "out").exists()


def test_no_picture_is_left(options, tmp_path):
    from PIL import Image

    for split in ("train", "validation"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(3):
                path = tmp_path / "data" / split / name / f"{number}.png"
                Image.new("RGB", (32, 32)).save(path)
                if split == "validation":
                    path.write_bytes(b"no picture")
    pictures = ImageArguments(dataset_name=str(tmp_path / "data"), label_column="label")
    with pytest.raises(ValueError, match=r"in both splits, got \{'train': 6, 'validation': 0\}"):
        evaluate_probe(ProbeArguments(**options), pictures)
