"""Which metrics there are for which reference, and that Inception alone gives a FID."""

import numpy as np
import pytest
import torch

from hf_fae.evaluation.inputs.extractors import InceptionExtractor, load_extractors
from hf_fae.evaluation.inputs.references import Reference, ReferenceBatch
from hf_fae.evaluation.metrics.distances import inception_score
from hf_fae.evaluation.resumable import Parts
from hf_fae.evaluation.tasks.sample_scores import METRICS, score_samples


WIDTHS = {"features": 2048, "spatial": 2023, "logits": 1008}


@pytest.fixture
def stats(tmp_path):
    """A reference of statistics alone."""
    arrays = {"mu": np.linspace(0, 1, 2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "stats.npz", **arrays)
    return ReferenceBatch(str(tmp_path / "stats.npz"))


@pytest.fixture
def samples(tmp_path):
    parts = Parts(tmp_path / "samples", 40, 32)
    parts.compute(
        lambda numbers: {f"inception.{name}": torch.randn(len(numbers), width) for name, width in WIDTHS.items()}, ""
    )
    return parts


@pytest.mark.filterwarnings("ignore")
def test_statistics_alone_give_no_more_than_fid_sfid_and_is(stats, samples, inception_file, tmp_path):
    extractor = InceptionExtractor(str(inception_file))
    reference = Reference(stats, [extractor], tmp_path / "reference", 32)
    found = score_samples(samples, reference, extractor, [name for name in METRICS if name != "fid"])
    assert found.keys() == {"sfid", "is", "is_std"}
    assert (found["is"], found["is_std"]) == inception_score(samples.stack("inception.logits"))
    # From N(0, 1): |m|^2 + tr C + D - 2 tr C^(1/2), where C has the eigenvalues of the samples' inner products.
    spatial = samples.stack("inception.spatial").double()
    mean = spatial.mean(0)
    eigenvalues = torch.linalg.eigvalsh((spatial - mean) @ (spatial - mean).T / 39).clamp_min(0)
    expected = mean.square().sum() + eigenvalues.sum() + 2023 - 2 * eigenvalues.sqrt().sum()
    assert found["sfid"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_another_judge_is_named(judge_folder, tmp_path):
    np.savez(tmp_path / "batch.npz", arr_0=np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8))
    (extractor,) = load_extractors([f"effnet={judge_folder}"])
    reference = Reference(ReferenceBatch(str(tmp_path / "batch.npz")), [extractor], tmp_path / "reference", 32)
    reference.compute()
    found = score_samples(reference.parts, reference, extractor, METRICS)
    assert {name for name in found if not name.endswith("_effnet")} == set()
    assert found["fid_effnet"] == pytest.approx(0, abs=1e-9)  # of pictures from themselves
    assert found["precision_effnet"] == found["recall_effnet"] == 1
