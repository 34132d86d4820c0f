import json

import pytest
import yaml

from hf_fae.evaluation.reports.report import Evaluation


def test_reports_hold_everything(tmp_path):
    settings = {"model": {"path": "x", "sha256": "0"}, "num_samples": 50000, "text_model": None}
    Evaluation("generation", {"fid": 2.08}, settings, "some/folder/here", "validation", {"damaged": 1}).save(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"] == {"fid": 2.08} and report["settings"] == settings
    assert report["details"] == {"damaged": 1}
    assert {"torch", "diffusers", "hf_fae"} <= report["versions"].keys()
    assert not (tmp_path / ".eval_results").exists()  # which are of data sets on the Hub alone


def test_entries_for_the_hub_have_the_protocol(tmp_path):
    settings = {"model": {"path": "x", "sha256": "0"}, "num_samples": 50000, "text_model": None}
    Evaluation("generation", {"fid": 2.08, "is": 207.6}, settings, "ILSVRC/imagenet-1k").save(tmp_path)
    entries = yaml.safe_load((tmp_path / ".eval_results" / "hf_fae.yaml").read_text())
    assert [entry["value"] for entry in entries] == [2.08, 207.6]
    assert entries[0]["dataset"] == {"id": "ILSVRC/imagenet-1k", "task_id": "fid"}
    assert entries[0]["notes"] == "task generation, model.path x, model.sha256 0, num_samples 50000"


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"psnr": float("nan")}, "reconstruction of model 'x' gives no result: psnr is nan"),
        ({}, "reconstruction of model 'x' gives no result: there are no metrics"),
    ],
)
def test_without_a_result_nothing_is_written(tmp_path, metrics, message):
    with pytest.raises(ValueError, match=message):
        Evaluation("reconstruction", metrics, {"model": {"path": "x"}}, "some/data").save(tmp_path)
    assert not any(tmp_path.iterdir())
