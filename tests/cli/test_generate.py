"""`hf-fae generate`, called as a function."""

import json
import re

import numpy as np
import pytest
from command_line import fail
from factories import (
    tiny_autoregressive,
    tiny_fae_mar_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_kl,
    tiny_mar,
    tiny_starflow,
    tiny_text_starflow_pipeline,
)
from PIL import Image

from hf_fae.cli import main


def test_generate(saved, tmp_path, capsys):
    output = tmp_path / "grid.png"
    argv = ["generate", "--model", str(saved / "pipeline"), "--output", str(output), "--device", "cpu"]
    main([*argv, "--class", "3", "class 7", "--num-images-per-prompt", "3", "--guidance-scale", "1.5", "--seed", "5"])
    assert "wrote 6 images" in capsys.readouterr().out
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
    assert "wrote 2 images" in capsys.readouterr().out
    both = np.asarray(Image.open(tmp_path / "grid.png"))
    main([*argv, "--prompt", "a cat", "--seed", "5"])
    alone = np.asarray(Image.open(tmp_path / "grid.png"))
    # Kernels for other batch sizes may round differently.
    assert np.abs(both[:, : alone.shape[1]].astype(int) - alone).max() <= 1
    main([*argv, "--prompt", "a dog", "--seed", "5"])
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), alone)
    capsys.readouterr()
    assert "Pipeline that generates from texts: use --prompt" in fail(capsys, *argv, "--class", "1")
    classes = ["generate", "--model", saved / "pipeline", *flags]
    assert "is a FAEDiTPipeline that generates from classes: use --class" in fail(
        capsys, *classes, "--prompt", "a cat"
    )
    assert "one of the arguments --class --prompt is required" in fail(capsys, *classes)
    own = fail(capsys, *argv, "--prompt", "a dog", "--text-encoder", "x")
    assert "text_encoder must be None with this pipeline, which has its own, got 'x'" in own

    pipe = make(guidance_scale=2.0)
    for part in (pipe.text_encoder, pipe.tokenizer):
        part.save_pretrained(tmp_path / "text")
    make(guidance_scale=2.0, text_encoder=None, tokenizer=None).save_pretrained(tmp_path / "texts")
    assert "text_encoder must name that of the pipeline" in fail(capsys, *argv, "--prompt", "a cat")
    assert "text_encoder 'none' cannot be loaded" in fail(capsys, *argv, "--prompt", "a", "--text-encoder", "none")
    main([*argv, "--prompt", "a cat", "--seed", "5", "--text-encoder", str(tmp_path / "text")])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), alone)


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
        (["--output", "grid.gif"], "must end in .png, .webp, .jpg or .jpeg, got 'grid.gif'"),
        (["--output", "absent/grid.png"], "'absent', which does not exist"),
        (["--model", "absent/folder/here"], "'absent/folder/here' is not a local folder"),
    ],
)
def test_generate_refuses(saved, tmp_path, monkeypatch, capsys, changed, message):
    monkeypatch.chdir(tmp_path)
    argv = ["generate", "--model", saved / "pipeline", "--class", "1", "--output", "grid.png", "--device", "cpu"]
    assert message in fail(capsys, *argv, *changed)
    assert not list(tmp_path.iterdir())


def test_flow_on_diffusers_own_autoencoder(tmp_path, capsys):
    pipe = tiny_fae_starflow_pipeline(vae=tiny_kl(), transformer=tiny_starflow(patch_size=2))
    pipe.save_pretrained(tmp_path / "flow")
    generate = ["generate", "--model", tmp_path / "flow", "--output", tmp_path / "a.png", "--class", "class 3", "1"]
    main([str(argument) for argument in [*generate, "--guidance-scale", 3]])
    assert Image.open(tmp_path / "a.png").width == 2 * 36
    assert "wrote 2 images" in capsys.readouterr().out
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
    assert "wrote 1 image " in capsys.readouterr().out
    message = "num_inference_steps must be None for AutoregressiveTransformer2DModel, .* got 3"
    assert re.search(message, fail(capsys, *generate, tmp_path / "raster", "--num-inference-steps", 3))
    main(["inspect", str(tmp_path / "mar")])
    assert "conditions: 16 x 32" in capsys.readouterr().out
