"""`hf-fae reconstruct`, called as a function."""

import pytest
from command_line import fail
from factories import (
    tiny_detok,
    tiny_maetok,
)
from PIL import Image

from hf_fae.cli import main


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
    ("argv", "message"),
    [
        (["--model", "pipeline", "absent.png"], "'absent.png' cannot be read: No such file"),
        (["--model", "pipeline", "no_picture.png"], "'no_picture.png' cannot be read: these 5 bytes are no image"),
        (["--model", "tokenizer", "grey.png"], "comes without its frozen encoder and names none: pass --encoder"),
        (["--model", "tokenizer", "grey.png", "--encoder", "tokenizer"], "--encoder 'tokenizer' cannot be loaded"),
        (["--model", "pipeline/transformer", "grey.png"], "must be a tokenizer of hf_fae"),
        (["--model", "encoder", "grey.png"], "--model 'encoder'"),
    ],
)
def test_reconstruct_refuses(saved, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(saved)
    output = tmp_path / "sheet.png"
    assert message in fail(capsys, "reconstruct", *argv, "--output", output)
    assert not output.exists()
