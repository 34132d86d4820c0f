"""LoRA fine-tuning with new classes, from a folder of images to images of its classes."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from factories import (
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_mar_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_lightning_dit,
    tiny_mar,
    tiny_random_autoregressive,
    tiny_starflow,
)
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from hf_fae import FAEDiTPipeline, FlowMatchEulerMaruyamaScheduler
from hf_fae.data.conditions import match_classes
from hf_fae.generators.lora_layers import LORA_TARGETS, add_lora, lora_weights


SCRIPTS = Path(__file__).parents[2] / "training_scripts"
CONFIGS = Path(__file__).parents[1] / "configs"
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture
def train(monkeypatch, published, encoder, image_folder):
    """Runs the script on the images of circle, cross, dot and ring; flags that are given replace these."""
    monkeypatch.syspath_prepend(SCRIPTS)

    def train(output_dir, **flags):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        defaults = {"pipeline": published, "image_encoder": encoder, "dataset_name": image_folder}
        flags = {**defaults, "report_to": "none", "output_dir": output_dir, **flags}
        argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        config = str(CONFIGS / "smoke_lora.yaml")
        importlib.import_module("train_lora").main(["--config", config, *argv])
        return output_dir

    return train


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A pipeline that knows "circle" and "ring" (as a synonym) among its classes, without its frozen encoder."""
    folder = tmp_path_factory.mktemp("published")
    tiny_fae_dit_pipeline(
        transformer=tiny_lightning_dit(num_classes=5),
        scheduler=FlowMatchEulerMaruyamaScheduler(shift=2.5),
        id2label={0: "tench", 1: "circle", 2: "crane", 3: "band, ring", 4: "dog"},
    ).save_pretrained(folder)
    return folder


def load(folder):
    pipe = FAEDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def log(folder, name):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if name in entry]


def generate(pipe, labels):
    return pipe(labels, generator=torch.Generator().manual_seed(0), output_type="pt").images


def test_known_and_new_classes(tmp_path, train, published):
    run = train(tmp_path / "run", label_column="label")
    assert sorted(path.name for path in run.glob("*.safetensors")) == [WEIGHTS]
    assert len(log(run, "validation/loss")) == 1
    with Image.open(run / "validation" / "samples-0000004.png") as grid:
        assert grid.width >= 64

    plain, tuned = load(published), load(published)
    tuned.load_lora_weights(run)
    assert tuned.label2id["circle"] == 1 and tuned.label2id["ring"] == 3
    assert tuned.id2label[5] == "cross" and tuned.id2label[6] == "dot" and tuned.transformer.config.num_classes == 7
    before, after = plain.transformer.state_dict(), tuned.transformer.state_dict()
    layers = {name for name in after if ".lora_" in name}
    targets = {name.split(".lora_")[0] for name in layers}
    assert len(targets) == 2 * len(LORA_TARGETS) and all(after[name].any() for name in layers)
    for name, value in after.items():
        if name == "class_embedding.weight":
            old = before[name]
            assert torch.equal(value[:5], old[:5]) and torch.equal(value[7], old[5])
            # Both new ones started from the mean, and went their own ways, at most a learning rate a step.
            distance = (value[5:7] - old[:5].mean(0)).abs()
            assert (distance > 0).all() and distance.max() < 4.1e-3 and not torch.equal(value[5], value[6])
        elif name not in layers:
            assert torch.equal(value, before[name.replace(".base_layer.", ".")]), name
    # lora_alpha travels with the file.
    assert tuned.transformer.blocks[0].attn.to_q.scaling == {"default_0": 2.0}

    image, other = generate(tuned, ["cross", "dot"])
    assert not torch.equal(image, other)
    tuned.unload_lora_weights()
    assert tuned.id2label == plain.id2label
    assert torch.equal(generate(tuned, ["circle"]), generate(plain, ["circle"]))


def test_resumed_run_is_the_same(tmp_path, train):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, label_column="label")
    train(parts, label_column="label", max_train_steps=2)
    interrupted = load_file(parts / WEIGHTS)
    train(parts, label_column="label", resume_from_checkpoint="latest")
    expected, resumed = load_file(whole / WEIGHTS), load_file(parts / WEIGHTS)
    assert expected.keys() == resumed.keys() and "new_classes.cross" in expected
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    assert not all(torch.equal(value, interrupted[name]) for name, value in expected.items())


def test_known_classes_only(tmp_path, train, published, image_folder):
    data = tmp_path / "data"  # two of the folders, and no validation split
    for name in ("circle", "ring"):
        shutil.copytree(image_folder / "train" / name, data / name)
    run = train(tmp_path / "run", dataset_name=data, label_column="label", max_train_steps=2)
    assert not any(key.startswith("new_classes.") for key in load_file(run / WEIGHTS))
    assert log(run, "validation/loss") == []
    assert len(list((run / "validation").glob("samples-*.png"))) == 1
    tuned, plain = load(published), load(published)
    tuned.load_lora_weights(run)
    assert tuned.transformer.config.num_classes == 5
    assert not torch.equal(generate(tuned, "ring"), generate(plain, "ring"))


def test_a_folder_of_one_class(tmp_path, train, published, image_folder):
    data = image_folder / "train" / "dot"
    flags = {"dataset_name": data, "class_name": "my-dog", "init_class": "dog", "max_train_steps": 1}
    run = train(tmp_path / "run", **flags, ema_decay=0, learning_rate=1e-4)
    pipe = load(published)
    dog = pipe.transformer.class_embedding.weight[4].detach()
    pipe.load_lora_weights(run)
    assert pipe.id2label[5] == "my-dog" and len(generate(pipe, "my-dog")) == 1
    learnt = pipe.transformer.class_embedding.weight[5].detach()
    torch.testing.assert_close(learnt, dog, atol=1.01e-4, rtol=0)
    assert not torch.equal(learnt, dog)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "either from label_column or from class_name, got no labels"),
        ({"class_name": "a", "label_column": "label"}, "either from label_column or from class_name"),
        ({"label_column": "label", "resolution": 64}, "resolution must be that of the tokenizer, 32, got 64"),
        ({"label_column": "label", "init_class": "dgo"}, "init_class has the unknown name 'dgo'.*'dog'"),
        ({"label_column": "label", "rank": 0}, "rank must be at least 1, got 0"),
        ({"label_column": "label", "target_modules": "to_x"}, "target_modules .*got 'to_x'"),
        ({"label_column": "species"}, "has no column 'species'"),
    ],
)
def test_bad_input(tmp_path, train, flags, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()


def test_only_new_rows_get_a_gradient():
    model = tiny_lightning_dit()
    table = model.class_embedding.weight.detach().clone()
    latents, timestep, labels = torch.randn(3, 4, 4, 4), torch.tensor(500.0), torch.tensor([2, 8, 10])
    expected = model(latents, timestep, labels).sample
    add_lora(model, 2, 2, ["to_q"], new_classes=2)
    actual = model(latents, timestep, labels).sample
    assert torch.equal(actual, expected)  # LoRA layers start at zero, and the table is what it was
    F.mse_loss(actual, torch.zeros_like(actual)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (rows,) = (p for name, p in trained.items() if "lora_" not in name)
    assert len(trained) == 2 * 2 + 1 and all(p.grad is not None for p in trained.values())
    assert rows.shape == (2, 32) and rows.grad[0].any() and not rows.grad[1].any()  # labels hold 8, and no 9

    with torch.no_grad():
        rows.add_(1)
    assert torch.equal(model.class_embedding.weight, torch.cat([table[:8], table[8:10] + 1, table[10:]]))
    learnt = lora_weights(model, ["eight", "nine"])["new_classes"]
    assert torch.equal(learnt["eight"], table[8] + 1) and torch.equal(learnt["nine"], table[9] + 1)


class Labels:
    """Data, as far as their classes are concerned."""

    def __init__(self, *names):
        self.id2label = dict(enumerate(names)) or None


def test_classes_of_a_pipeline_without_names():
    names = [f"kind {i}" for i in range(10)]
    pipe = tiny_fae_dit_pipeline(id2label=None)
    data, found, new_classes = match_classes(pipe, Labels(*names))
    assert data.class_ids.tolist() == list(range(10)) and (found, new_classes) == (names, [])
    assert pipe.id2label == dict(enumerate(names)) and pipe.transformer.config.num_classes == 10
    pipe = tiny_fae_dit_pipeline(id2label=None)
    with pytest.raises(ValueError, match="label_column has 9 classes, and the pipeline 10 without names"):
        match_classes(pipe, Labels(*names[:9]))
    assert pipe.transformer.config.num_classes == 10 and not pipe.id2label
    assert match_classes(pipe, Labels(), class_name="my-dog")[2] == ["my-dog"]  # it is new, whatever they are


def test_numbers_are_no_names_to_go_by():
    numbers = [str(i) for i in range(10)]
    pipe = tiny_fae_dit_pipeline(id2label=dict(enumerate(numbers)))
    data, _, new_classes = match_classes(pipe, Labels(*numbers))
    assert data.class_ids.tolist() == list(range(10)) and new_classes == []
    for labels in (Labels("0", "1"), Labels("star", "7")):
        with pytest.raises(ValueError, match="label_column must hold names, got the numbers"):
            match_classes(pipe, labels)
    assert pipe.transformer.config.num_classes == 10
    pipe = tiny_fae_dit_pipeline()
    data, _, new_classes = match_classes(pipe, Labels("3", "class 3"))
    assert data.class_ids.tolist() == [10, 3] and new_classes == ["3"]


def test_encoder_that_comes_with_the_pipeline(tmp_path, train, image_folder):
    folder = tmp_path / "pipeline"
    tiny_fae_dit_pipeline(vae=tiny_fae(with_encoder=True)).save_pretrained(folder)
    flags = {"pipeline": folder, "image_encoder": "nowhere", "label_column": "label", "max_train_steps": 1}
    assert (train(tmp_path / "run", **flags) / WEIGHTS).is_file()


def test_images_named_like_splits_are_no_validation_split(tmp_path, train, image_folder):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, path in enumerate(sorted((image_folder / "train").rglob("*.png"))[:8]):
        shutil.copy(path, pictures / ("validation-1.png" if number == 0 else f"{number}.png"))
    run = train(tmp_path / "run", dataset_name=pictures, class_name="dog")
    assert log(run, "loss") and not log(run, "validation/loss")


@pytest.mark.parametrize(
    ("make_pipeline", "make_transformer", "measure"),
    [
        pytest.param(tiny_fae_starflow_pipeline, tiny_starflow, "bits_per_dim", id="flow"),
        pytest.param(tiny_fae_mar_pipeline, tiny_mar, "noise_error", id="mar"),
        pytest.param(tiny_fae_mar_pipeline, tiny_random_autoregressive, "noise_error", id="random"),
    ],
)
def test_lora_of_other_generators(tmp_path, train, image_folder, make_pipeline, make_transformer, measure):
    labels = {0: "tench", 1: "circle", 2: "ring"}
    folder = tmp_path / "pipeline"
    trained = make_pipeline(transformer=make_transformer(num_classes=3), id2label=labels)
    trained.save_pretrained(folder)
    run = train(tmp_path / "run", pipeline=folder, label_column="label")
    assert log(run, measure) and log(run, f"validation/{measure}")
    pipe = type(trained).from_pretrained(folder)
    pipe.load_lora_weights(run)
    assert list(pipe.id2label.values()) == ["tench", "circle", "ring", "cross", "dot"]
    assert pipe(["dot", "circle"], output_type="pt").images.isfinite().all()
