"""What a run publishes: facts of its data and its machine, and the check of the Hub before it starts."""

import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from factories import tiny_fae
from test_hub import run

from hf_fae.data.conditions import ClassData
from hf_fae.data.encode_dataset import encode_dataset
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.latent_cache import CachedLatents
from hf_fae.training.publish import training_run


SCRIPT = Path(__file__).parents[2] / "training_scripts" / "train_fae.py"


@pytest.fixture
def data(image_folder):
    return ImageData(DataArguments(str(image_folder), resolution=32, label_column="label", max_validation_samples=50))


def test_facts_of_images(data, image_folder):
    facts = {"dataset": str(image_folder), "split": "train", "validation_split": "validation", "resolution": 32}
    assert ClassData(data, [0, 1, 2, 3]).facts() == {**facts, "validation_samples": None}
    for _ in range(2):
        assert sum(len(batch["row_ids"]) for batch in data.validation_batches(3)) == 4
    assert data.facts() == {**facts, "validation_samples": 4}


def test_facts_of_latents_are_those_of_their_images(tmp_path, data, image_folder):
    encode_dataset(tmp_path, tiny_fae(with_encoder=True), data, Accelerator(cpu=True), source="tester/fae")
    defaults = {"dataset_name": str(tmp_path), "resolution": 256, "max_validation_samples": 256}
    trained = training_run(defaults, 10, 320, {"loss": 0.5}, CachedLatents(tmp_path))
    assert trained.datasets == [str(image_folder)]
    (result,) = trained.results
    assert (result.dataset, result.split) == (str(image_folder), "validation")
    assert result.protocol == {"resolution": 32, "validation samples": 4}


def test_only_finite_numbers_are_results(data):
    values = {"a": 1, "b": np.float32(0.5), "c": float("nan"), "d": np.inf, "samples": "a picture"}
    trained = training_run({"mixed_precision": "bf16"}, 1, 1, values, data)
    assert {result.name: result.value for result in trained.results} == {"a": 1.0, "b": 0.5}
    assert all(type(result.value) is float for result in trained.results)
    assert trained.results[0].protocol["mixed precision"] == "bf16"
    assert training_run({}, 1, 1, values).results == []


def test_the_command_is_what_was_typed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", "run"])
    trained = training_run({}, 1, 1, None, accelerator=Accelerator(cpu=True))
    assert trained.command == ["training_scripts/train_fae.py", "--output_dir", "run"]
    assert trained.machine == "1 process on cpu, in fp32"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "scripts" / "mine.py")])
    assert training_run({}, 1, 1, None).command == ["mine.py"]
    monkeypatch.chdir(tmp_path)
    assert training_run({}, 1, 1, None).command == ["scripts/mine.py"]


def test_check_hub(hub):
    seen = run(
        hub,
        """
from huggingface_hub import HfApi
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.publish import check_hub

def check(repo_id, **kwargs):
    try:
        check_hub(LoopArguments("run", hub_model_id=repo_id, **{"push_to_hub": True, **kwargs}))
    except ValueError as error:
        return str(error)

seen = {"made": check("tester/run"), "again": check("tester/run"), "exists": HfApi().repo_exists("tester/run")}
seen["dry run"] = check("tester/dry", dry_run=True)
seen["no push"] = check("tester/none", push_to_hub=False)
seen["not made"] = [HfApi().repo_exists(f"tester/{name}") for name in ("dry", "none")]
seen["no id"] = check("tester/a/b", dry_run=True)
seen["someone else's"] = [check("else/run"), check("else/run", dry_run=True)]
os.environ.pop("HF_TOKEN")
seen["nobody"] = [check("tester/run"), check("tester/run", dry_run=True)]
os.environ["HF_TOKEN"] = "hf_other"
seen["refused"] = check("tester/new")
print(json.dumps(seen))
""",
    )
    assert [seen[name] for name in ("made", "again", "dry run", "no push")] == [None] * 4
    assert seen["exists"] and seen["not made"] == [False, False]
    assert "hub_model_id must be a repository such as user/name, got 'tester/a/b'" in seen["no id"]
    for message in seen["someone else's"]:
        assert "hub_model_id must belong to one of ['tester'], who are logged in, got 'else/run'" in message
    for message in (*seen["nobody"], seen["refused"]):
        assert message.startswith("push_to_hub cannot push to 'tester/") and "hf auth login" in message
