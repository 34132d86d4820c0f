"""Code that comes with a checkpoint is never run, and nothing is asked on standard input."""

import ast
import json
from pathlib import Path

import pytest
import transformers
from factories import tiny_encoder, tiny_fae_dit_pipeline

from hf_fae.encoders import VisionEncoder
from hf_fae.loading import open_pipeline, open_tokenizer
from hf_fae.text import load_text_encoder


ROOT = Path(__file__).parents[1]
PLANTED = """
from pathlib import Path
Path({marker!r}).write_text("code of the checkpoint was run")
from transformers import PreTrainedConfig, PreTrainedModel
class Config(PreTrainedConfig):
    model_type = "planted"
class Model(PreTrainedModel):
    config_class = Config
"""


def calls():
    """(place, call) of every `from_pretrained` and `from_config` whose class may be transformers'."""
    for folder in ("src", "training_scripts", "experiments", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
            of_transformers = {a.asname or a.name for n in imports if n.module == "transformers" for a in n.names}
            for node in ast.walk(tree):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if node.func.attr not in ("from_pretrained", "from_config"):
                    continue
                owner = node.func.value
                # `model_class` is what `hf_fae.text` chooses among the classes of transformers.
                if isinstance(owner, ast.Name) and (owner.id in of_transformers or "transformers" in path.name):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node
                elif path.name == "text.py" or (
                    isinstance(owner, ast.Attribute) and "transformers" in ast.dump(owner)
                ):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_every_call_of_transformers_forbids_remote_code():
    found = list(calls())
    assert len(found) >= 12  # the search finds what is there
    for place, call in found:
        values = [word.value for word in call.keywords if word.arg == "trust_remote_code"]
        assert [getattr(value, "value", None) for value in values] == [False], f"{place} lacks trust_remote_code=False"


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that planted code writes. A question on standard input fails the test."""

    def ask(prompt=""):
        raise AssertionError(f"asked on standard input: {prompt}")

    monkeypatch.setattr("builtins.input", ask)
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists()


def plant(folder, marker, **changed):
    """Put code into a folder, and name it in its config."""
    (folder / "planted.py").write_text(PLANTED.format(marker=str(marker)))
    auto_map = dict.fromkeys(("AutoModel", "AutoModelForTextEncoding"), "planted.Model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "planted.Config", **auto_map}, **changed}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changed", [{"model_type": "planted"}, {}], ids=["unknown type", "known type"])
def test_planted_encoder(tmp_path, marker, changed):
    folder = tmp_path / "encoder"
    tiny_encoder().save_pretrained(folder)
    plant(folder, marker, **changed)
    if changed:
        with pytest.raises(ValueError, match="contains custom code which must be executed"):
            VisionEncoder.from_pretrained(folder)
    else:
        assert VisionEncoder.from_pretrained(folder).hidden_size == 32  # its own class, not the planted one


def test_planted_text_encoder(tmp_path, marker):
    folder = tmp_path / "text"
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformers.BertModel(config).save_pretrained(folder)
    plant(folder, marker, model_type="planted")
    with pytest.raises(ValueError, match="contains custom code which must be executed"):
        load_text_encoder(str(folder))


def test_planted_parts_of_a_pipeline(tmp_path, marker):
    folder = tmp_path / "pipeline"
    tiny_fae_dit_pipeline(with_encoder=True).save_pretrained(folder)
    plant(folder / "vae" / "image_encoder.d", marker)
    plant(folder / "transformer", marker)
    (folder / "planted.py").write_text(PLANTED.format(marker=str(marker)))
    with pytest.raises(ValueError):  # unknown keys of the transformer's config
        open_pipeline("--model", str(folder))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["planted", "Pipeline"]}))
    with pytest.raises(ValueError):
        open_pipeline("--model", str(folder))


def test_planted_tokenizer(tmp_path, marker):
    folder = tmp_path / "tokenizer"
    tiny_fae_dit_pipeline(with_encoder=True).vae.save_pretrained(folder)
    plant(folder, marker)
    with pytest.raises(ValueError, match="cannot be loaded"):
        open_tokenizer(str(folder))
