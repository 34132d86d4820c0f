import json

import pytest
import yaml

from hf_fae.evaluation.reports.report import Evaluation, identify_model


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
        ({}, "reconstruction of model 'x' gives no result: there is nothing to measure"),
    ],
)
def test_without_a_result_nothing_is_written(tmp_path, metrics, message):
    with pytest.raises(ValueError, match=message):
        Evaluation("reconstruction", metrics, {"model": {"path": "x"}}, "some/data").save(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_folder_is_known_by_its_weights_and_configs(pipeline_folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(pipeline_folder, copy)
    (copy / "README.md").write_text("Another card")
    shutil.copytree(pipeline_folder / "transformer", copy / "checkpoint-10")
    shutil.copytree(pipeline_folder / "transformer", copy / "evaluation" / "parts")
    (copy / "evaluation" / "settings.json").write_text("{}")
    assert identify_model(str(copy))["sha256"] == identify_model(str(pipeline_folder))["sha256"]
    config = copy / "transformer" / "config.json"
    config.write_text(config.read_text().replace("10", "11"))
    assert identify_model(str(copy))["sha256"] != identify_model(str(pipeline_folder))["sha256"]


def test_a_hub_id_is_known_by_its_revision(hub):
    found = hub.run("""
from factories import tiny_fae_dit_pipeline
from hf_fae import FAEDiTPipeline
from hf_fae.evaluation.reports.report import identify_model
tiny_fae_dit_pipeline().push_to_hub("tester/fae-dit")
FAEDiTPipeline.from_pretrained("tester/fae-dit")
print(identify_model("tester/fae-dit"))
""")
    expected = {"path": "tester/fae-dit", "revision": hub.head("tester/fae-dit")}
    assert found.strip().splitlines()[-1] == str(expected)
