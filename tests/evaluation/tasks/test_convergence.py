"""EP-FID: the epochs until unguided samples are close enough, and which evaluations it may be read from."""

import json

import pytest
from evaluations import read_report, run

from hf_fae.evaluation.tasks.convergence import epochs_to_reach


@pytest.fixture(scope="module")
def report(tmp_path_factory, pipeline_folder, judge_folder, data_folder):
    """The report of an evaluation without guidance."""
    folder = tmp_path_factory.mktemp("report") / "out"
    options = {"model": pipeline_folder, "dataset_name": data_folder, "split": "train", "num_samples": 10}
    options |= {"extractors": f"effnet={judge_folder}", "metrics": "fid", "guidance_scale": "1"}
    run("generation", **options, output_dir=folder)
    return read_report(folder)


@pytest.fixture
def write(tmp_path, report):
    def write(epochs, value, **settings):
        folder = tmp_path / f"epochs-{epochs}"
        folder.mkdir()
        model = {"path": str(folder), "sha256": str(epochs)}
        changed = {**report, "metrics": {"fid_effnet": value}}
        changed["settings"] = {**report["settings"], "model": model, **settings}
        (folder / "report.json").write_text(json.dumps(changed))
        return f"{epochs}={folder}"

    return write


def evaluate(tmp_path, reports, **options):
    options = {"metric": "fid_effnet", "output_dir": tmp_path / "out", **options}
    return run("convergence", reports=reports, **options)


@pytest.mark.filterwarnings("ignore")
def test_first_epochs_at_the_threshold(tmp_path, write):
    reports = [write(80, 1.5), write(20, 2.5), write(40, 2.0), write(60, 2.1)]
    result = evaluate(tmp_path, reports)
    assert result.metrics == {"ep_fid_effnet@2": 40}
    assert result.details == {"values": {"20": 2.5, "40": 2.0, "60": 2.1, "80": 1.5}}
    assert read_report(tmp_path / "out")["settings"]["model"]["sha256"] == "40"
    assert "labels balanced" in result.protocol and result.protocol.endswith("epochs 20, 40, 60, 80")
    assert evaluate(tmp_path, reports).metrics == result.metrics
    with pytest.raises(ValueError, match="holds an evaluation with another"):
        evaluate(tmp_path, reports, threshold=1.7)


def test_epochs_to_reach():
    assert epochs_to_reach({10: 3.0, 20: 2.0, 30: 1.0}, 2.0) == 20
    assert epochs_to_reach({10: 3.0}, 2.0) is None


def test_errors(tmp_path, write):
    one, two = write(20, 2.5), write(40, 2.2)
    guided = write(60, 1.0, guidance_scale={"intervals": [[0.0, 1.0, 1.5]], "channels": None})
    base = write(70, 1.0, internal_guidance_scale={"intervals": [[0.1, 1.0, 1.78]], "channels": None})
    random = write(80, 1.0, labels="random")
    for reports, options, message in (
        (
            [one, two],
            {},
            "threshold must be reached by a report, got 2: the lowest fid_effnet is 2.2, after 40 epochs",
        ),
        ([one, guided], {}, "reports must be of samples without guidance, got guidance_scale"),
        ([one, base], {}, "reports must be of samples without guidance, got internal_guidance_scale"),
        ([one, random], {}, "reports must have one protocol, got labels 'random' .* and 'balanced'"),
        ([one, one], {}, "reports must have different epochs"),
        ([one], {"metric": "fid"}, "reports must be of generation with the metric fid, got generation"),
        ([one], {"threshold": 0}, "threshold must be positive, got 0"),
        (["20"], {}, "reports must be EPOCHS=FOLDER of finished evaluations, got '20'"),
        (["x=" + str(tmp_path)], {}, "reports must be EPOCHS=FOLDER"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path, reports, **options)
    assert not (tmp_path / "out").exists()
