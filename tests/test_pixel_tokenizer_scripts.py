"""The experiments on l-DeTok and MAETok: what they run, what they measure, what they say."""

from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch
import yaml
from clean_state import datasets_cache, fresh_accelerate  # noqa: F401 - fixtures
from factories import tiny_detok, tiny_encoder
from PIL import Image
from timm.models import save_for_hf


CONFIGS = Path(__file__).parents[1] / "training_scripts" / "configs"
TINY = ["--max_train_steps", "1", "--train_batch_size", "4", "--lr_warmup_steps", "0", "--report_to", "none"]


@pytest.fixture
def pictures(tmp_path):
    """A data set with the columns of Fluent Emoji that the scripts read."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    names = ["group", "subgroup", "base"]
    features = Features({"image": ImageFeature(), **{name: Value("string") for name in names}})
    for split, count in (("train", 60), ("validation", 8)):
        columns = {
            "image": [Image.effect_noise((32, 32), 20 + number).convert("RGB") for number in range(count)],
            **{name: [str(number % 2 if name != "base" else number) for number in range(count)] for name in names},
        }
        path = tmp_path / "pictures" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(tmp_path / "pictures")


@pytest.mark.parametrize("kind, arguments", [("detok", "DeTokArguments"), ("maetok", "MAETokArguments")])
def test_runs_change_what_there_is(script, kind, arguments):
    known = {field.name for field in fields(getattr(script(f"train_{kind}"), arguments))}
    for _, *_, settings in script(f"emoji_{kind}").RUNS.values():
        assert settings.keys() <= known


@pytest.mark.parametrize("name, millions", [("detok_bb", 171.71), ("detok_sb_ablation", 111.61)])
def test_configs_make_the_papers_tokenizers(script, name, millions):
    module, config = script("train_detok"), yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
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
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    expected = {
        "detok_bb": (200 * 1251, 50 * 1251, 100 * 1251, 1e-4 * 1024 / 256),
        "detok_bb_decoder": (100 * 1251, 5 * 1251, 0, 5e-5 * 1024 / 256),
        "maetok_b_256": (500_000, 10_000, 30_000, 1e-4 * 512 / 256),
        "maetok_b_512_decoder": (50_000, 0, 0, 1e-4),
    }[name]
    found = (config["max_train_steps"], config.get("lr_warmup_steps", 0), config["discriminator_start"])
    assert (*found, config["learning_rate"]) == pytest.approx(expected)


def test_errors_of_damaged_latents(script, tmp_path, pictures):
    emoji, vae = script("emoji_detok"), tiny_detok()
    vae.save_pretrained(tmp_path / "vae")
    errors = emoji.damaged_errors(tmp_path / "vae", pictures)
    assert errors.keys() == emoji.METRICS.keys() - {"fid_effnet"}
    data = emoji.ImageData(emoji.DataArguments(pictures, resolution=32))
    (batch,) = data.validation_batches(8)
    images = batch["pixel_values"]
    with torch.no_grad():
        expected = ((vae(images).sample - images) / 2).square().mean().item()
    assert errors["error_0.0"] == pytest.approx(expected, rel=1e-4)
    assert len(set(errors.values())) == len(errors)


def test_tables(script):
    emoji = script("emoji_detok")
    results = [
        {name: dict.fromkeys(emoji.METRICS, sign * place) for place, name in enumerate(emoji.RUNS)} for sign in (1, -1)
    ]
    text = emoji.table(results)
    assert "| fid_effnet of samples | noise and masks | plain autoencoder | 1 of 2 |" in text
    assert "| masks | 0.0000 ± 1.4142 |" in text
    emoji = script("emoji_maetok")
    results = [{name: dict.fromkeys(emoji.METRICS, float(place)) for place, name in enumerate(emoji.RUNS)}]
    text = emoji.table(results)
    assert "| linear probe | masks, 40 to 60 % | plain autoencoder | 1 of 1 |" in text
    assert "| denoising loss | masks, 40 to 60 % | plain autoencoder | 0 of 1 |" in text
    assert "| plain autoencoder | 0.0000 | 0.0000 |" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detok", "maetok"])
def test_experiment(script, tmp_path, pictures, monkeypatch, kind):
    emoji = script(f"emoji_{kind}")
    monkeypatch.setattr(emoji, "RUNS", {"both": emoji.RUNS["both"]})
    monkeypatch.setattr(emoji, "table", lambda results: str(sorted(results[0]["both"])))
    if kind == "detok":
        monkeypatch.setattr(emoji, "SAMPLES", 10)
    else:
        monkeypatch.setattr(emoji, "LATENTS", {"components": [1, 2], "denoising_steps": 1})
        monkeypatch.setattr(emoji, "PROBE", {**emoji.PROBE, "probe_steps": 2, "probe_batch_size": 16})
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    save_for_hf(timm.create_model("test_efficientnet", num_classes=10), tmp_path / "judge", safe_serialization=True)
    flags = ["--encoder", str(tmp_path / "encoder"), "--data", pictures, "--judge", str(tmp_path / "judge")]
    emoji.main([*flags, "--seeds", "1", "--output", str(tmp_path / "out"), "--flags", *TINY])
    assert (tmp_path / "out" / "results.md").read_text() == f"{sorted(emoji.METRICS)}\n"
