"""The papers' configs of l-DeTok and MAETok."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml


CONFIGS = Path(__file__).parents[1] / "training_scripts" / "configs"


@pytest.mark.parametrize("name, millions", [("detok_bb", 171.71), ("detok_sb_ablation", 111.61)])
def test_configs_make_the_papers_tokenizers(script, name, millions):
    module, config = script("train_detok"), yaml.safe_load((CONFIGS / name.split("_")[0] / f"{name}.yaml").read_text())
    known = {field.name for field in fields(module.DeTokArguments)}
    args = module.DeTokArguments(**{key: value for key, value in config.items() if key in known})
    with torch.device("meta"):
        model = module.new_tokenizer(args, config["resolution"])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert (model.config.noise_type, model.config.noise_gamma) == ("interpolate", 3.0)
    assert not model.config.rotary_as_released


@pytest.mark.parametrize("name", ["detok_bb", "detok_bb_decoder", "maetok_b_256", "maetok_b_512_decoder"])
def test_papers_numbers(name):
    """Epochs of 1,251 steps of 1,024 images; MAETok's steps as they are printed."""
    config = yaml.safe_load((CONFIGS / name.split("_")[0] / f"{name}.yaml").read_text())
    expected = {
        "detok_bb": (200 * 1251, 50 * 1251, 100 * 1251, 1e-4 * 1024 / 256),
        "detok_bb_decoder": (100 * 1251, 5 * 1251, 0, 5e-5 * 1024 / 256),
        "maetok_b_256": (500_000, 10_000, 30_000, 1e-4 * 512 / 256),
        "maetok_b_512_decoder": (50_000, 0, 0, 1e-4),
    }[name]
    found = (config["max_train_steps"], config.get("lr_warmup_steps", 0), config["discriminator_start"])
    assert (*found, config["learning_rate"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, epochs, batch",
    [("mar_b", 800, 1024), ("mar_l", 800, 1024), ("sit_xl_tokens", 800, 256), ("lightningdit_xl_tokens", 320, 1024)],
)
def test_epochs_of_generators(name, epochs, batch):
    """Of both papers' generators on 8 devices, in pictures of ImageNet; what they print is rounded."""
    config = yaml.safe_load(next(CONFIGS.rglob(f"{name}.yaml")).read_text())
    assert 8 * config["train_batch_size"] == batch
    assert config["max_train_steps"] * batch == pytest.approx(epochs * 1_281_167, rel=2e-3)
