"""The command line, called as a function; once as a program."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factories import (
    tiny_autoregressive,
    tiny_detok,
    tiny_encoder,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_mar_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_kl,
    tiny_maetok,
    tiny_mar,
    tiny_starflow,
    tiny_text_starflow_pipeline,
)
from PIL import Image

from hf_fae.cli import main
from hf_fae.inspection import count_parameters


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a pipeline, a tokenizer without encoder, that encoder, and pictures of several modes."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_fae_dit_pipeline(with_encoder=True).save_pretrained(folder / "pipeline")
    tiny_fae(with_encoder=False).save_pretrained(folder / "tokenizer")
    tiny_encoder().save_pretrained(folder / "encoder")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(folder / "transparent.png")
    Image.fromarray(pixels[..., 0], "L").save(folder / "grey.png")
    Image.fromarray(pixels, "CMYK").save(folder / "print.jpg")
    (folder / "no_picture.png").write_text("hello")
    return folder


def fail(capsys, *argv) -> str:
    """The one line on standard error of a command that must fail."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in argv])
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    # Progress bars of what was loaded before go to standard error as well.
    line = captured.err.splitlines()[-1]
    assert line.startswith("hf-fae") and ": error: " in line
    return line


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


def test_generate(saved, tmp_path, capsys):
    output = tmp_path / "grid.png"
    argv = ["generate", "--model", str(saved / "pipeline"), "--output", str(output), "--device", "cpu"]
    main([*argv, "--class", "3", "class 7", "--num-images-per-prompt", "3", "--guidance-scale", "1.5", "--seed", "5"])
    assert "wrote 6 pictures" in capsys.readouterr().out
    first = np.asarray(Image.open(output))
    # The pictures of class 3 stay the same when class 7 is not drawn.
    main([*argv, "--class", "class 3", "--num-images-per-prompt", "3", "--guidance-scale", "1.5", "--seed", "5"])
    second = np.asarray(Image.open(output))
    assert np.array_equal(first[: len(second)], second)
    main([*argv, "--class", "3", "--num-images-per-prompt", "3", "--guidance-scale", "1.5", "--seed", "6"])
    assert not np.array_equal(np.asarray(Image.open(output)), second)


@pytest.mark.parametrize("make", [tiny_fae_text_to_image_pipeline, tiny_text_starflow_pipeline])
def test_generate_texts(saved, tmp_path, capsys, make):
    make(guidance_scale=2.0).save_pretrained(tmp_path / "texts")
    flags = ["--output", str(tmp_path / "grid.png")]
    argv = ["generate", "--model", str(tmp_path / "texts"), *flags]
    main([*argv, "--prompt", "a cat", "dog", "--seed", "5"])
    assert "wrote 2 pictures" in capsys.readouterr().out
    both = np.asarray(Image.open(tmp_path / "grid.png"))
    main([*argv, "--prompt", "a cat", "--seed", "5"])
    alone = np.asarray(Image.open(tmp_path / "grid.png"))
    assert np.array_equal(both[:, : alone.shape[1]], alone)
    main([*argv, "--prompt", "a dog", "--seed", "5"])
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), alone)
    capsys.readouterr()
    assert "Pipeline that draws texts: use --prompt" in fail(capsys, *argv, "--class", "1")
    classes = ["generate", "--model", saved / "pipeline", *flags]
    assert "is a FAEDiTPipeline that draws classes: use --class" in fail(capsys, *classes, "--prompt", "a cat")
    assert "one of the arguments --class --prompt is required" in fail(capsys, *classes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["pipeline", "pipeline/vae"])
def test_reconstruct(saved, tmp_path, capsys, model, dtype):
    output = tmp_path / "sheet.png"
    pictures = [str(saved / name) for name in ("transparent.png", "grey.png", "print.jpg")]
    main(["reconstruct", "--model", str(saved / model), *pictures, "--output", str(output), "--dtype", dtype])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5  # three pictures, their mean, what was written
    assert all("PSNR" in line and "feature cosine" in line for line in lines[:4])
    width, height = Image.open(output).size
    assert width >= 6 * 32 and height >= 32


@pytest.mark.parametrize("make", [tiny_detok, tiny_maetok])
def test_reconstruct_without_features(saved, tmp_path, capsys, make):
    make().save_pretrained(tmp_path / "tokenizer")
    output = tmp_path / "sheet.png"
    main(["reconstruct", "--model", str(tmp_path / "tokenizer"), str(saved / "grey.png"), "--output", str(output)])
    lines = capsys.readouterr().out.splitlines()
    assert "PSNR" in lines[0] and "cosine" not in lines[0] and output.is_file()


def test_reconstruct_with_a_given_encoder_is_the_same(saved, tmp_path):
    sheets = []
    for model in (["pipeline"], ["tokenizer", "--encoder", str(saved / "encoder")]):
        argv = ["reconstruct", "--output", str(tmp_path / "sheet.png"), str(saved / "grey.png")]
        main([*argv, "--model", str(saved / model[0]), *model[1:]])
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert sheets[0] == sheets[1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--class", "nobody"], "'nobody'"),
        (["--class", "clas 7"], "did you mean 'class 7'"),
        (["--class", "10"], "from 0 to 9, got 10"),
        (["--class"], "--class"),
        (["--prompt", "a cat"], "argument --prompt: not allowed with argument --class"),
        (["--num-inference-steps", "0"], "positive whole number, got '0'"),
        (["--num-images-per-prompt", "two"], "positive whole number, got 'two'"),
        (["--guidance-scale", "nan"], "got nan"),
        (["--dtype", "int8"], "int8"),
        (["--device", "toaster"], "'toaster' cannot be used here"),
        (["--output", "grid.jpg"], "must end in .png, got 'grid.jpg'"),
        (["--output", "absent/grid.png"], "'absent', which does not exist"),
        (["--model", "absent/folder/here"], "'absent/folder/here' is no folder here"),
    ],
)
def test_generate_refuses(saved, tmp_path, monkeypatch, capsys, changed, message):
    monkeypatch.chdir(tmp_path)
    argv = ["generate", "--model", saved / "pipeline", "--class", "1", "--output", "grid.png", "--device", "cpu"]
    assert message in fail(capsys, *argv, *changed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "pipeline", "absent.png"], "'absent.png' cannot be read: No such file"),
        (["--model", "pipeline", "no_picture.png"], "'no_picture.png' cannot be read: cannot identify"),
        (["--model", "tokenizer", "grey.png"], "comes without its frozen encoder and names none: pass --encoder"),
        (["--model", "tokenizer", "grey.png", "--encoder", "tokenizer"], "--encoder 'tokenizer' cannot be loaded"),
        (["--model", "pipeline/transformer", "grey.png"], "which is no tokenizer of hf_fae"),
        (["--model", "encoder", "grey.png"], "--model 'encoder'"),
    ],
)
def test_reconstruct_refuses(saved, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(saved)
    output = tmp_path / "sheet.png"
    assert message in fail(capsys, "reconstruct", *argv, "--output", output)
    assert not output.exists()


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
        ("absent/folder", "'absent/folder' is no folder"),
        (".", "has neither a config.json nor a model_index.json"),
    ],
)
def test_inspect_refuses(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    assert message in fail(capsys, "inspect", name)


def test_inspect_refuses_an_unknown_class(saved, tmp_path, capsys):
    folder = damaged(saved, tmp_path / "damaged", set_config(_class_name="AutoencoderNobodyKnows"))
    assert "'AutoencoderNobodyKnows', which is no model known here" in fail(capsys, "inspect", folder)


def test_flow_on_diffusers_own_autoencoder(tmp_path, capsys):
    pipe = tiny_fae_starflow_pipeline(vae=tiny_kl(), transformer=tiny_starflow(patch_size=2))
    pipe.save_pretrained(tmp_path / "flow")
    generate = ["generate", "--model", tmp_path / "flow", "--output", tmp_path / "a.png", "--class", "class 3", "1"]
    main([str(argument) for argument in [*generate, "--guidance-scale", 3]])
    assert Image.open(tmp_path / "a.png").width == 2 * 36
    assert "wrote 2 pictures" in capsys.readouterr().out
    message = "--num-inference-steps has no meaning for a FAEStarFlowPipeline"
    assert message in fail(capsys, *generate, "--num-inference-steps", 3)

    main(["inspect", str(tmp_path / "flow"), "--json"])
    report = json.loads(capsys.readouterr().out)
    parts = report["components"]
    assert parts["vae"]["class"] == "AutoencoderKL" and parts["vae"]["shapes"] == {}
    for name in ("vae", "transformer"):
        assert report["parameters"][name] == sum(p.numel() for p in getattr(pipe, name).parameters())


def test_autoregressive_models(tmp_path, capsys):
    for name, transformer in (("mar", tiny_mar()), ("raster", tiny_autoregressive(patch_size=2))):
        tiny_fae_mar_pipeline(transformer=transformer).save_pretrained(tmp_path / name)
    generate = ["generate", "--output", tmp_path / "a.png", "--class", "class 3", "--model"]
    main([str(word) for word in [*generate, tmp_path / "mar", "--num-inference-steps", 2, "--guidance-scale", 3]])
    main([str(word) for word in [*generate, tmp_path / "raster"]])
    assert "wrote 1 pictures" in capsys.readouterr().out
    message = "num_inference_steps must be None for AutoregressiveTransformer2DModel, .* got 3"
    assert re.search(message, fail(capsys, *generate, tmp_path / "raster", "--num-inference-steps", 3))
    main(["inspect", str(tmp_path / "mar")])
    assert "conditions: 16 x 32" in capsys.readouterr().out


@pytest.mark.parametrize("make", [tiny_fae_text_to_image_pipeline, tiny_text_starflow_pipeline])
def test_inspect_a_pipeline_of_texts(tmp_path, capsys, make):
    make().save_pretrained(tmp_path)
    main(["inspect", str(tmp_path)])
    assert "encoder_hidden_states: 6 x 24" in capsys.readouterr().out
