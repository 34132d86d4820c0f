"""A model in a report: known by its hash or its revision."""

import shutil

from hf_fae.evaluation.provenance import identify_model


def test_a_folder_is_known_by_its_weights_and_configs(pipeline_folder, tmp_path):

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
from hf_fae.evaluation.provenance import identify_model
tiny_fae_dit_pipeline().push_to_hub("tester/fae-dit")
FAEDiTPipeline.from_pretrained("tester/fae-dit")
print(identify_model("tester/fae-dit"))
""")
    expected = {"path": "tester/fae-dit", "revision": hub.head("tester/fae-dit")}
    assert found.strip().splitlines()[-1] == str(expected)
