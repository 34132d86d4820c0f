"""What was saved once loads and computes the same: configs, names of weights, their meaning (`recorded_models`)."""

import json

import pytest
import torch
from diffusers import AutoModel
from model_cases import CASES
from recorded_models import RECORD, compute, formula_weights
from safetensors.torch import save_file


ENTRIES = json.loads(RECORD.read_text())


def test_every_class_is_recorded():
    assert ENTRIES.keys() == CASES.keys(), "run `python tests/recorded_models.py`"


@pytest.mark.parametrize("name", ENTRIES)
def test_what_was_saved_loads_and_computes_the_same(name, tmp_path):
    entry = ENTRIES[name]
    (tmp_path / "config.json").write_text(json.dumps(entry["config"]))
    weights = formula_weights(entry["tensors"])
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    model = AutoModel.from_pretrained(str(tmp_path))
    assert type(model).__name__ == entry["config"]["_class_name"]
    expected = torch.tensor(entry["output"])
    torch.testing.assert_close(torch.tensor(compute(CASES[name], model)), expected, atol=1e-4, rtol=1e-3)
    assert expected.isfinite().all() and expected.unique().numel() > 4
