"""Published files: every format is read, whatever is in them never runs, and what is wrong is one sentence."""

import argparse
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_lightning_dit
from safetensors.torch import save_file

from hf_fae.convert.files import build, read_pickled_tensors, read_weights


class Planted:
    """Unpickled by pickle itself, touches a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def weights():
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.ckpt", "w.safetensors", "old.pt"])
def test_every_format(name, tmp_path):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(weights(), path)
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=name != "old.pt")
    same(read_weights(path), weights())


def test_nesting_and_prefixes(tmp_path):
    raw = {key: torch.zeros_like(value) for key, value in weights().items()}
    averaged = {f"module._orig_mod.{key}": torch.nn.Parameter(value) for key, value in weights().items()}
    path = tmp_path / "w.pt"
    torch.save({"model": raw, "model_ema": averaged, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}, path)
    same(read_weights(path, ema=("model_ema",)), weights())
    same(read_weights(path, ema=()), raw)
    with pytest.raises(ValueError, match=r"w\.pt must hold averaged weights under 'ema', got 'model', 'model_ema'"):
        read_weights(path)
    torch.save({"state_dict": weights(), "callbacks": {}}, path)
    same(read_weights(path), weights())


def test_settings_of_a_training(tmp_path, monkeypatch):
    """Objects of a framework are passed over, whether or not it is installed: it is never imported."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    callback = module.ModelCheckpoint()
    callback.best = 0.5
    path = tmp_path / "w.ckpt"
    torch.save({"state_dict": weights(), "callbacks": {module.ModelCheckpoint: callback}, "loss": np.float64(2)}, path)
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    same(read_weights(path), weights())
    assert "pytorch_lightning" not in sys.modules


def test_weights_are_mapped(tmp_path):
    torch.save({"w": torch.zeros(2**20)}, tmp_path / "w.pt")
    read_weights(tmp_path / "w.pt")["w"].add_(1)  # on pages of the process, not of the file
    assert not read_weights(tmp_path / "w.pt")["w"].any()


@pytest.mark.parametrize("suffix", ["pt", "ckpt", "pth"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_nothing_runs(suffix, is_zip, tmp_path):
    path, touched = tmp_path / f"w.{suffix}", tmp_path / "touched"
    torch.save({"ema": weights(), "args": Planted(touched)}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=rf"w\.{suffix} must"):
        read_weights(path)
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists()  # it would have run


def test_nothing_runs_from_a_pickle(tmp_path):
    path, touched = tmp_path / "stats.pkl", tmp_path / "touched"
    path.write_bytes(pickle.dumps({"channel": (torch.ones(2), Planted(touched))}))
    with pytest.raises(ValueError, match=r"stats\.pkl must be a whole pickle of tensors .* got an object of 'pathlib"):
        read_pickled_tensors(path)
    assert not touched.exists()


class PlantedStorage:
    """A tensor's bytes in a pickle are a file of torch's, which may hold something else."""

    def __init__(self, content: bytes):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def test_nothing_runs_from_a_storage_in_a_pickle(tmp_path):
    path, touched = tmp_path / "stats.pkl", tmp_path / "touched"
    torch.save(Planted(touched), tmp_path / "inner", _use_new_zipfile_serialization=False)
    path.write_bytes(pickle.dumps(PlantedStorage((tmp_path / "inner").read_bytes())))
    with pytest.raises(ValueError, match=r"stats\.pkl must be a whole pickle of tensors"):
        read_pickled_tensors(path)
    assert not touched.exists()


class AcceleratorPickler(pickle.Pickler):
    """Pickles tensors as if they were on a CUDA device: their storages say so."""

    def reducer_override(self, value):
        if not isinstance(value, (torch.storage.TypedStorage, torch.UntypedStorage)):
            return NotImplemented
        function, (content,) = value.__reduce__()
        assert b"X\x03\x00\x00\x00cpu" in content
        return function, (content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"),)


@pytest.mark.parametrize("pickler", [pickle.Pickler, AcceleratorPickler])
def test_pickled_tensors(pickler, tmp_path):
    mean, std = torch.arange(4.0), torch.nn.Parameter(torch.ones(4))
    with open(tmp_path / "stats.pkl", "wb") as file:
        pickler(file).dump({"key": {"channel": (mean[1:], std)}, "list": [1, 2.5, None, "x"]})
    read = read_pickled_tensors(tmp_path / "stats.pkl")
    assert torch.equal(read["key"]["channel"][0], mean[1:])
    assert torch.equal(read["key"]["channel"][1], std)
    assert read["list"] == [1, 2.5, None, "x"]


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "old.pt", "stats.pkl"])
@pytest.mark.parametrize("kept", [0.97, 0.5, 0])
def test_truncated(name, kept, tmp_path):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(weights(), path)
    elif name.endswith("pkl"):
        path.write_bytes(pickle.dumps(weights()))
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=name != "old.pt")
    os.truncate(path, int(path.stat().st_size * kept))
    read = read_pickled_tensors if name.endswith("pkl") else read_weights
    with pytest.raises(ValueError, match=rf"{name} must be a .*, got") as raised:
        read(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "must be a checkpoint of torch that holds tensors, got another kind"),
        ([1, 2], "must hold a state dict, got list"),
        ({"a": 1}, "must hold a state dict of tensors, got 'a': int"),
        ({}, "must hold weights, got none"),
        ({"optimizer": {}, "epoch": 1}, "must hold a state dict of tensors, got 'optimizer': dict"),
    ],
)
def test_other_files(content, message, tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_weights(path)


def test_no_file(tmp_path):
    for read in (read_weights, read_pickled_tensors):
        with pytest.raises(FileNotFoundError, match=r"absent\.pt must be a file of"):
            read(tmp_path / "absent.pt")


def test_build_takes_the_tensors():
    model = tiny_lightning_dit()
    state = model.state_dict()
    built = build(type(model), dict(model.config), state)
    assert not built.training
    for key, value in built.state_dict().items():
        assert value.data_ptr() == state[key].data_ptr()
    inputs = {"timestep": torch.tensor([500.0]), "class_labels": torch.tensor([1])}
    config = model.config
    x = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
    torch.testing.assert_close(built(x, **inputs).sample, model.eval()(x, **inputs).sample)
    assert build(type(model), dict(model.config), state, torch.bfloat16).dtype == torch.bfloat16


def test_build_names_the_key():
    model = tiny_lightning_dit()
    state = model.state_dict()
    key = next(iter(state))
    cases = [
        ({name: value for name, value in state.items() if name != key}, f"must have the weight '{key}' of Light"),
        ({**state, "extra.weight": torch.ones(1)}, "must hold only weights of Lightning.*, got 'extra.weight'"),
        ({**state, key: torch.ones(1, 2)}, rf"must have '{key}' of shape \(.*\) for this Light.*, got \(1, 2\)"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            build(type(model), dict(model.config), wrong)
