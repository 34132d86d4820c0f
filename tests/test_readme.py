"""What the README shows runs: its Python, and its `hf-fae` commands, on tiny models in the places that it names."""

import re
import shlex
from pathlib import Path

import pytest
from clean_state import datasets_cache, fresh_accelerate  # noqa: F401 - fixtures
from factories import (
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_lightning_dit,
    tiny_starflow,
)

from hf_fae.cli import main


README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A working directory that looks as after `make demo`."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    labels = {index: f"class {index}" for index in range(97)} | {0: "heart", 1: "cat-face"}
    pipe = tiny_fae_dit_pipeline(id2label=labels, transformer=tiny_lightning_dit(num_classes=97))
    pipe.save_pretrained("outputs/demo/4-dit")
    tiny_fae().save_pretrained("outputs/demo/3-pixels")
    flow = tiny_fae_starflow_pipeline(id2label=labels, transformer=tiny_starflow(num_classes=97))
    flow.save_pretrained("outputs/starflow")
    Image.new("RGB", (50, 40), "red").save("picture.jpg")
    Path("my-pictures").mkdir()
    for number in range(3):
        Image.effect_noise((50, 40), 40 + number).convert("RGB").save(f"my-pictures/{number}.png")


def test_python(demo):
    (code,) = blocks("python")
    namespace = {}
    exec(code, namespace)
    assert len(namespace["images"]) == 2 and namespace["x"].shape == namespace["pixel_values"].shape
    assert len(namespace["flow_images"]) == 1


def test_commands(demo, capsys):
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if line.startswith("hf-fae ")]
    assert len(commands) >= 4
    for command in commands:
        main(shlex.split(command, comments=True)[1:])
    assert Path("samples.png").is_file() and Path("pairs.png").is_file()
    assert Path("outputs/evaluation/report.json").is_file()
    assert "305,360,896" in capsys.readouterr().out


def test_files_that_it_names_exist():
    root = Path(__file__).parents[1]
    for path in re.findall(r"\]\((docs/[^)#]+)\)|((?:training_scripts|src)/[\w/.]+)", README):
        assert (root / (path[0] or path[1])).exists(), path
