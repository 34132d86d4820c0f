"""The experiments on emoji: what they run, what they measure, what they say."""

import json
from dataclasses import fields

import pytest
import timm
import torch
from clean_state import datasets_cache, fresh_accelerate  # noqa: F401 - fixtures
from factories import tiny_detok, tiny_encoder, tiny_fae, tiny_fae_dit_pipeline, tiny_lightning_dit, tiny_maetok
from PIL import Image
from timm.models import save_for_hf

from hf_fae.data.images import DataArguments, ImageData


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
    for _, *_, settings in script(kind).RUNS.values():
        assert settings.keys() <= known


def test_generators_change_what_there_is(script):
    emoji = script("generators")
    arguments = {
        "generator": script("train_generator").DenoiserArguments,
        "autoregressive": script("train_autoregressive").AutoregressiveArguments,
    }
    for _, config, settings in emoji.GENERATORS.values():
        assert settings.keys() <= {field.name for field in fields(arguments[config])}


def test_errors_of_damaged_latents(script, tmp_path, pictures):
    emoji, vae = script("detok"), tiny_detok()
    vae.save_pretrained(tmp_path / "vae")
    errors = emoji.corrupt_errors(tmp_path / "vae", pictures)
    assert errors.keys() == {metric for metric in emoji.METRICS if metric.startswith("error")}
    data = ImageData(DataArguments(pictures, resolution=32))
    (batch,) = data.validation_batches(8)
    images = batch["pixel_values"]
    with torch.no_grad():
        expected = ((vae(images).sample - images) / 2).square().mean().item()
    assert errors["error_0.0"] == pytest.approx(expected, rel=1e-4)
    assert len(set(errors.values())) == len(errors)


@pytest.mark.filterwarnings("ignore")  # so few pictures
def test_measures_of_latents(script, tmp_path, pictures, monkeypatch):
    """Tokenizers that differ by the scale of their latents, which statistics undo, are alike; others are not."""
    emoji = script("maetok")
    monkeypatch.setattr(emoji, "MIXTURES", {"components": [1, 2]})
    monkeypatch.setattr(emoji, "DENOISER", {"steps": 2, "batch_size": 4})
    monkeypatch.setattr(emoji, "PROBE", {"steps": 2, "batch_size": 16})
    vae, other = tiny_maetok(), tiny_maetok(encoder_num_layers=1)
    folders = {name: tmp_path / name for name in ("one", "scaled", "other")}
    vae.save_pretrained(folders["one"])
    other.save_pretrained(folders["other"])
    with torch.no_grad():
        for buffer in (vae.latents_mean, vae.latents_std):
            buffer *= 2
        for parameter in vae.encoder.proj_out.parameters():
            parameter *= 2
    vae.save_pretrained(folders["scaled"])
    for folder in folders.values():
        (folder / "log.jsonl").write_text('{"validation/psnr": 20.0}\n')
    found = emoji.measure(folders, pictures, seed=0)
    assert found["one"].keys() == emoji.METRICS.keys()
    assert found["scaled"] == pytest.approx(found["one"], rel=1e-3)
    assert abs(found["other"]["nll"] - found["one"]["nll"]) > 1e-3


def test_tables(script):
    emoji = script("detok")
    results = [
        {name: dict.fromkeys(emoji.METRICS, sign * place) for place, name in enumerate(emoji.RUNS)} for sign in (1, -1)
    ]
    text = emoji.table(results)
    assert "| fid_effnet of samples | noise and masks | plain autoencoder | 1 of 2 |" in text
    assert "| masks | 0.0000 ± 1.4142 |" in text
    emoji = script("maetok")
    results = [{name: dict.fromkeys(emoji.METRICS, float(place)) for place, name in enumerate(emoji.RUNS)}]
    text = emoji.table(results)
    assert "| linear probe | masks, 40 to 60 % | plain autoencoder | 1 of 1 |" in text
    assert "| denoising loss | masks, 40 to 60 % | plain autoencoder | 0 of 1 |" in text
    assert "| plain autoencoder | 0.0000 | 0.0000 |" in text
    emoji = script("generators")
    results = [{name: dict.fromkeys(emoji.GENERATORS, place) for name, place in places} for places in PLACES]
    text = emoji.table(results, {"fae": 2.0, "detok": 1.0, "maetok": 3.0})
    assert "| rFID of the tokenizer | 2.0000 | 1.0000 | 3.0000 | |" in text
    assert "| MAR | 1.5000 ± 0.7071 | 1.5000 ± 0.7071 | 3.0000 ± 0.0000 | 1 of 2 |" in text


def test_table_of_raev2(script, tmp_path, capsys):
    """Numbers of two finished seeds; `table` prints them while a third one runs."""
    emoji = script("raev2")
    metrics = dict.fromkeys(emoji.TOKENIZERS, emoji.TOKENIZER_METRICS) | dict.fromkeys(
        emoji.GENERATORS, emoji.GUIDANCE
    )
    for seed in (0, 1):
        results = {name: dict.fromkeys(of_run, place + seed) for place, (name, of_run) in enumerate(metrics.items())}
        (tmp_path / f"seed-{seed}").mkdir()
        (tmp_path / f"seed-{seed}" / "results.json").write_text(json.dumps(results))
    flags = ["--encoder", str(tmp_path), "--data", str(tmp_path)]  # not read
    emoji.main(["table", *flags, "--output", str(tmp_path)])
    text = capsys.readouterr().out
    assert "| last layer | 0.5000 ± 0.7071 | 0.5000 ± 0.7071 |" in text
    title = "fid_effnet, w = 1"
    assert f"| 3 layers, clean latents: {title} | 3 layers, velocity: {title} | 2 of 2 |" in text
    assert f"| 3 layers, clean latents: {title} | last layer, clean latents: {title} | 0 of 2 |" in text
    emoji.main(["table", *flags, "--output", str(tmp_path / "seed-0")])
    assert capsys.readouterr().out == "no seed has finished\n"


def test_table_of_baselines(script):
    emoji = script("baselines")
    metrics = {name: dict.fromkeys(emoji.METRICS, float(place)) for place, name in enumerate(emoji.TOKENIZERS)}
    text = emoji.table([dict.fromkeys(emoji.TOKENIZERS, 1.0), dict.fromkeys(emoji.TOKENIZERS, 2.0)], metrics)
    assert "| pixel VAE | 0.00 | 0.00 | 0.00 | 1.5000 ± 0.7071 |" in text and "| VA-VAE | 1.00 |" in text
    assert len(text.splitlines()) == 2 + 7


PLACES = [[("fae", 2), ("detok", 1), ("maetok", 3)], [("fae", 1), ("detok", 2), ("maetok", 3)]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detok", "maetok"])
def test_experiment(script, tmp_path, pictures, monkeypatch, kind):
    emoji = script(kind)
    monkeypatch.setattr(emoji, "RUNS", {"both": emoji.RUNS["both"]})
    monkeypatch.setattr(emoji, "table", lambda results: str(sorted(results[0]["both"])))
    if kind == "detok":
        monkeypatch.setattr(emoji, "SAMPLES", 10)
        monkeypatch.setattr(emoji, "SHOWN", ("both",))
    else:
        monkeypatch.setattr(emoji, "MIXTURES", {"components": [1, 2]})
        monkeypatch.setattr(emoji, "DENOISER", {"steps": 1, "batch_size": 4})
        monkeypatch.setattr(emoji, "PROBE", {"steps": 2, "batch_size": 16})
    run(emoji, tmp_path, pictures)
    assert (tmp_path / "out" / "results.md").read_text() == f"{sorted(emoji.METRICS)}\n"


@pytest.mark.slow
def test_raev2(script, tmp_path, pictures, monkeypatch):
    """On an encoder of 2 layers; finished seeds are not run again."""
    emoji = script("raev2")
    monkeypatch.setattr(emoji, "TOKENIZERS", {"last": ("last", [1]), "three": ("two", [0, 1])})
    generators = {name: emoji.GENERATORS[name] for name in ("last-sample", "three-sample", "three-velocity")}
    monkeypatch.setattr(emoji, "GENERATORS", generators)
    monkeypatch.setattr(emoji, "SAMPLES", 10)
    run(emoji, tmp_path, pictures)
    results = json.loads((tmp_path / "out" / "seed-0" / "results.json").read_text())
    assert [set(results[name]) for name in generators] == 3 * [set(emoji.GUIDANCE)]
    assert {*results["last"]} == {*emoji.TOKENIZER_METRICS}
    settings = json.loads((tmp_path / "out/seed-0/last-sample-guided_fid_effnet/report.json").read_text())["settings"]
    assert settings["internal_guidance_scale"]["intervals"] == [[0.1, 1.0, 1.78]]
    del results["three"]
    (tmp_path / "out" / "seed-0" / "results.json").write_text(json.dumps(results))
    with pytest.raises(KeyError, match="three"):  # finished seeds are read
        run(emoji, tmp_path, pictures)


@pytest.mark.slow
def test_few_steps(script, tmp_path, pictures, monkeypatch):
    emoji = script("few_steps")
    tokenizer, teacher = tmp_path / "tokenizer", tmp_path / "teacher"
    tiny_fae(with_encoder=False).save_pretrained(tokenizer)
    tiny_fae_dit_pipeline(
        vae=tiny_fae(with_encoder=False),
        transformer=tiny_lightning_dit(num_classes=2),
        id2label={0: "0", 1: "1"},
    ).save_pretrained(teacher)
    values = {"TOKENIZER": tokenizer, "TEACHER": teacher, "RESOLUTION": 32, "SAMPLES": 10, "CLASSES": ["0", "1"]}
    for name, value in values.items():
        monkeypatch.setattr(emoji, name, value)
    run(emoji, tmp_path, pictures, width=32)
    out = tmp_path / "out"
    lines = (out / "results.md").read_text().splitlines()
    assert len(lines) == 2 + 7 and lines[2].startswith("| teacher, 1 step |")
    emoji.main(["sheet", "--encoder", str(tmp_path), "--data", pictures, "--output", str(out)])
    assert Image.open(out / "samples.png").width > 256


@pytest.mark.slow
def test_baselines(script, tmp_path, pictures, monkeypatch):
    emoji = script("baselines")
    monkeypatch.setattr(emoji, "TOKENIZERS", {name: emoji.TOKENIZERS[name] for name in ("va-vae", "drorae")})
    monkeypatch.setattr(emoji, "SAMPLES", 10)
    run(emoji, tmp_path, pictures)
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert len(lines) == 2 + 2 and lines[2].startswith("| VA-VAE | ")


@pytest.mark.slow
def test_generators_on_tokenizers(script, tmp_path, pictures, monkeypatch):
    emoji = script("generators")
    monkeypatch.setattr(emoji, "GENERATORS", {name: emoji.GENERATORS[name] for name in ("mar", "sit")})
    monkeypatch.setattr(emoji, "SAMPLES", 10)
    monkeypatch.setattr(emoji, "CLASSES", ["0", "1"])
    run(emoji, tmp_path, pictures)
    out = tmp_path / "out"
    lines = (out / "results.md").read_text().splitlines()
    assert len(lines) == 3 + len(emoji.GENERATORS) and all(line.endswith(" of 1 |") for line in lines[3:])
    # Two pictures a row, with 2 pixels around each: MAR and SiT; originals, halves and MAR.
    assert Image.open(out / "samples.png").size == (136, 136)
    assert Image.open(out / "kept.png").size == (136, 204)


def run(emoji, folder, pictures, width=64):
    tiny_encoder(hidden_size=width).save_pretrained(folder / "encoder")  # by default as wide as a head of the FAE
    save_for_hf(timm.create_model("test_efficientnet", num_classes=10), folder / "judge", safe_serialization=True)
    flags = ["--encoder", str(folder / "encoder"), "--data", pictures, "--judge", str(folder / "judge")]
    emoji.main([*flags, "--seeds", "1", "--output", str(folder / "out"), "--flags", *TINY])


def test_drawings_of_a_subject(script, tmp_path):
    script("lora_subject").main([str(tmp_path / "drawings")])
    images = [Image.open(path) for path in sorted((tmp_path / "drawings").iterdir())]
    assert len(images) == 10 and {image.size for image in images} == {(256, 256)}
    assert len({image.tobytes() for image in images}) == 10  # no two are alike
    assert {image.getpixel((2, 2)) for image in images} == {(255, 255, 255)}
