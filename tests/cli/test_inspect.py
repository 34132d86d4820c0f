"""`hf-fae inspect`, called as a function and once as a program; corrupt checkpoints."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import fail
from factories import (
    tiny_encoder,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_text_starflow_pipeline,
)

from hf_fae.cli import main
from hf_fae.inspection import count_parameters


def damaged(saved: Path, folder: Path, edit) -> Path:
    """A copy of the pipeline after `edit(folder of the tokenizer)`."""
    shutil.copytree(saved / "pipeline", folder)
    edit(folder / "vae")
    return folder


def set_config(**values):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def truncate(folder):
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def test_inspect_presets_as_a_program():
    code = "from hf_fae.cli import main; main()"
    command = [sys.executable, "-c", code, "inspect", "fae-dinov2-g", "--json"]
    report = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert report["name"] == "fae-dinov2-g"
    assert report["class"] == "AutoencoderFAE"
    counts = {"encoder": 38_166_592, "feature_decoder": 170_428_416, "pixel_decoder": 305_360_896}
    assert report["parameters"] == {**counts, "total": sum(counts.values())}
    assert report["config"]["feature_dim"] == 1536


def test_inspect_json_of_a_generator(capsys):
    main(["inspect", "lightningdit-xl-1", "--json"])
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 675_256_736


def test_inspect_prints_parts(capsys):
    main(["inspect", "fae-dinov2-g"])
    printed = capsys.readouterr().out
    assert "38,166,592" in printed and "38.17 M" in printed
    assert "1,136,480,768" in printed and "frozen, not in the total" in printed
    assert "latents: 32 x 16 x 16" in printed


def test_inspect_pipeline(saved, capsys):
    main(["inspect", str(saved / "pipeline"), "--json"])
    report = json.loads(capsys.readouterr().out)
    pipe = tiny_fae_dit_pipeline()
    counts = {"transformer": count_parameters(pipe.transformer), "vae": count_parameters(pipe.vae)}
    assert report["class"] == "FAEDiTPipeline"
    assert report["parameters"] == {**counts, "total": sum(counts.values())}
    assert report["components"].keys() == {"transformer", "vae", "scheduler"}
    vae = report["components"]["vae"]
    assert vae["shapes"]["latents"] == [4, 4, 4]
    assert vae["weights"][""]["tensors"] == len(pipe.vae.state_dict())
    encoder = vae["components"]["image_encoder"]["parameters"]["total"]
    assert encoder == vae["frozen"]["image_encoder"] == count_parameters(tiny_encoder())
    main(["inspect", str(saved / "pipeline")])
    assert "FlowMatchEulerDiscreteScheduler" in capsys.readouterr().out


def test_inspect_variants_and_shards(tmp_path):
    from hf_fae.inspection import inspect

    vae = tiny_fae(with_encoder=False)
    vae.save_pretrained(tmp_path)
    vae.half().save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    weights = inspect(tmp_path)["weights"]
    assert list(weights) == ["", "fp16"]
    assert weights[""]["tensors"] == weights["fp16"]["tensors"]
    assert sum(weights["fp16"]["elements"].values()) == sum(weights[""]["elements"].values())
    assert len(list(tmp_path.glob("*fp16*.safetensors"))) > 1


def test_inspect_an_encoder(assets, capsys):
    main(["inspect", str(assets / "dinov2-small")])
    assert "22,056,576" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (truncate, "diffusion_pytorch_model.safetensors"),
        (set_config(nonsense=1), "unknown keys ['nonsense']"),
        (set_config(latent_channels=6), "encoder.proj_out.bias"),
        (set_config(decoder_num_layers=3), "feature_decoder.blocks.2"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
        (shutil.rmtree, "vae"),
    ],
    ids=["truncated", "unknown key", "other shape", "lacking weights", "broken JSON", "no component"],
)
def test_damaged_checkpoints_are_refused(saved, tmp_path, capsys, edit, message):
    folder = damaged(saved, tmp_path / "damaged", edit)
    assert message in fail(capsys, "inspect", folder)
    output = tmp_path / "grid.png"
    assert "cannot be loaded" in fail(capsys, "generate", "--model", folder, "--class", "1", "--output", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fae-dino2-g", "'fae-dino2-g' is no preset; did you mean fae-dinov2-g"),
        ("absent/folder", "'absent/folder' is not a folder"),
        (".", "has neither a config.json nor a model_index.json"),
    ],
)
def test_inspect_refuses(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    assert message in fail(capsys, "inspect", name)


def test_inspect_refuses_an_unknown_class(saved, tmp_path, capsys):
    folder = damaged(saved, tmp_path / "damaged", set_config(_class_name="AutoencoderNobodyKnows"))
    assert "'AutoencoderNobodyKnows', which is not a known model" in fail(capsys, "inspect", folder)


@pytest.mark.parametrize("make", [tiny_fae_text_to_image_pipeline, tiny_text_starflow_pipeline])
def test_inspect_a_pipeline_of_texts(tmp_path, capsys, make):
    make().save_pretrained(tmp_path)
    main(["inspect", str(tmp_path)])
    assert "encoder_hidden_states: 6 x 24" in capsys.readouterr().out
