"""FDr6 and MIND6: ratios to the distance of real images, and when that is known."""

from types import SimpleNamespace

import pytest
import torch
from evaluations import read_report, run

from hf_fae.evaluation.inputs.panel import PANEL
from hf_fae.evaluation.metrics.distances import GaussianStatistics, frechet_distance, sliced_distance
from hf_fae.evaluation.resumable import Parts
from hf_fae.evaluation.tasks.panel_scores import check_panel, real_distances


@pytest.fixture
def options(pipeline_folder, judge_folder, data_folder, tmp_path):
    """A run that works."""
    return {
        "model": pipeline_folder,
        "output_dir": tmp_path / "out",
        "extractors": [f"effnet={judge_folder}", f"again={judge_folder}"],
        "dataset_name": data_folder,
        "split": "train",
        "held_out_split": "validation",
        "num_samples": 40,
        "batch_size": 32,
        "metrics": ["fdr", "mind"],
    }


@pytest.mark.filterwarnings("ignore")  # so few samples
def test_ratios_of_the_parts_features(options, tmp_path):
    result = run("generation", **options)
    names = ("samples", "reference", "held_out")
    counts = dict(zip(names, (40, 90, 70)))
    features = {
        name: Parts(tmp_path / "out" / "parts" / name, counts[name], 32).stack("effnet.features") for name in names
    }
    assert len(features["held_out"]) == 69  # one of 70 is damaged
    samples, reference, real = (GaussianStatistics.of([values]) for values in features.values())
    ratio = frechet_distance(samples, reference) / frechet_distance(real, reference)
    mind = sliced_distance(features["samples"], features["held_out"])
    assert result.metrics == pytest.approx({"fdr_effnet+again": ratio, "mind_effnet+again": mind})
    details = read_report(tmp_path / "out")["details"]
    assert details["fdr"] == pytest.approx({"effnet": ratio, "again": ratio}) and ratio > 1
    assert details["real_distance"]["effnet"] == pytest.approx(frechet_distance(real, reference))
    assert "labels balanced; num_samples 40" in result.protocol and "held_out 70 images" in result.protocol

    (tmp_path / "out" / "report.json").unlink()
    for part in sorted((tmp_path / "out" / "parts").rglob("*.safetensors"))[::2]:
        part.unlink()
    assert run("generation", **options).metrics == result.metrics
    with pytest.raises(ValueError, match="holds an evaluation with another held_out"):
        run("generation", **options | {"held_out_split": "validation[:50]"})


ERRORS = {
    "no real images": ({"held_out_split": None}, "held_out_split must name real images .* for fdr, got None"),
    "the reference": ({"held_out_split": "train"}, "held_out_split must differ from split, got 'train' for both"),
    "one image": ({"held_out_split": "validation[:1]"}, "held_out_split must have at least 2 images, got 1"),
    "no use": ({"metrics": ["fid"]}, "held_out_split must be None without the metrics fdr and mind, got fid"),
    "no split": ({"held_out_split": "others"}, "split 'others', cannot be read"),
}


@pytest.mark.parametrize("change, message", ERRORS.values(), ids=ERRORS)
def test_errors(options, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run("generation", **options | change)
    assert not (tmp_path / "out").exists()


def test_published_distances_are_of_imagenet_and_of_its_spaces():
    six = [SimpleNamespace(name=name) for name in PANEL]
    check_panel(["fdr"], six, None, "ILSVRC/imagenet-1k", 256)
    assert real_distances(None, None, six)["convnextv2-b"] == 56.87
    for changes in (
        {"dataset": "coco"},
        {"resolution": 512},
        {"extractors": [SimpleNamespace(name="effnet")]},
        {"metrics": ["mind"]},
    ):
        arguments = {"metrics": ["fdr"], "extractors": six, "held_out_count": None}
        arguments |= {"dataset": "ILSVRC/imagenet-1k", "resolution": 256, **changes}
        with pytest.raises(ValueError, match="held_out_split must name real images"):
            check_panel(**arguments)


def test_gaussians_with_known_distances():
    """Ratios of means: samples are 3 away, real images 2, in units of a deviation that all share."""
    torch.manual_seed(0)
    base = torch.randn(500, 4, dtype=torch.float64)
    shift = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    reference, samples, real = (GaussianStatistics.of([base + scale * shift]) for scale in (0, 3, 2))
    assert frechet_distance(samples, reference) / frechet_distance(real, reference) == pytest.approx(9 / 4)
