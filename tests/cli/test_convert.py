"""`hf-fae zoo` and `hf-fae convert`, called as functions."""

import json

import pytest
import torch
from command_line import fail
from factories import tiny_mar, tiny_rae
from safetensors.torch import load_file

import hf_fae
from hf_fae.cli import main
from hf_fae.convert.files import read_weights
from hf_fae.zoo import ZOO


def test_zoo(capsys):
    main(["zoo"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ZOO) + 1
    row = next(line for line in lines if line.startswith("maetok-b-256 "))
    assert row.split("  ")[-1].strip() == "https://huggingface.co/MAETok/maetok-b-128" and "none stated" in row
    main(["zoo", "--json"])
    table = json.loads(capsys.readouterr().out)
    assert table["lightningdit-xl-800ep"]["tokenizer"] == "vavae-f16d32"
    assert table["mar-b"]["address"] == "https://github.com/LTH14/mar"


def test_convert(published_files, tmp_path, capsys):
    folder = published_files("maetok-b-256")
    output = str(tmp_path / "maetok")
    main(["convert", "maetok-b-256", "--output", output, "--files", str(folder), "--dtype", "bfloat16"])
    assert capsys.readouterr().out == f"wrote {output}\n"
    state = load_file(tmp_path / "maetok" / "diffusion_pytorch_model.safetensors")
    assert state["decoder.mask_token"].dtype == torch.bfloat16
    assert hf_fae.AutoencoderMAETok.from_pretrained(output).config.latent_channels == 8


@pytest.mark.parametrize("file", ["out.pth", "out.safetensors"])
@pytest.mark.parametrize("name", ["detok-bb", "vavae-f16d32"])
def test_there_and_back(name, file, published_files, tmp_path, capsys):
    """Exported, the file is what was read, to the bit; what only training uses is gone."""
    folder = published_files(name)
    main(["convert", name, "--output", str(tmp_path / "ours"), "--files", str(folder)])
    main(["convert", str(tmp_path / "ours"), "--export", str(tmp_path / file)])
    expected = read_weights(f"{folder}/{ZOO[name].source}/{ZOO[name].files['weights']}", ema=("model_ema",))
    written = read_weights(tmp_path / file)
    assert {key for key in expected if not key.startswith(("loss", "linear_proj"))} == written.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in written.items())


def test_export_with_statistics(tmp_path, capsys):
    tiny_rae().save_pretrained(tmp_path / "rae")
    main(["convert", str(tmp_path / "rae"), "--export", str(tmp_path / "model.pt")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'model.pt'}, {tmp_path / 'model.stat.pt'}\n"
    assert torch.load(tmp_path / "model.stat.pt")["var"].shape == (32, 4, 4)
    assert "decoder_pos_embed" in torch.load(tmp_path / "model.pt")


def test_bad_input(tmp_path, capsys):
    tiny_mar().save_pretrained(tmp_path / "mar")
    output = tmp_path / "converted"
    cases = [
        (["nothing", "--output", output], "name must be of published weights, got 'nothing'; see `hf-fae zoo`"),
        (
            ["mar-b", "--output", output],
            "files must be a folder with 'mar/mar_base/checkpoint-last.pth' of https://gith",
        ),
        (["mar-b", "--output", output, "--files", tmp_path / "no"], "files must be a folder, got"),
        (["mar-b", "--output", output, "--files", tmp_path], "files must be a folder with 'mar/mar_base/checkpoint-"),
        (["mar-b", "--output", tmp_path], "output must be a folder that is new or empty, got"),
        (["maetok-b-256", "--output", output, "--push-to-hub", "a/b"], "whose weights have no stated licence"),
        ([tmp_path / "mar", "--export", tmp_path / "w.bin"], "path must end in .pt, .pth or .safetensors, got"),
        ([tmp_path / "mar", "--export", tmp_path / "w.pt"], "source must be a model of Auto"),
        ([tmp_path / "no", "--export", tmp_path / "w.pt"], "source '"),
        ([tmp_path, "--export", tmp_path / "w.pt", "--files", tmp_path], "--files must not be given with --export"),
    ]
    for argv, message in cases:
        assert message in fail(capsys, "convert", *argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mar"]
