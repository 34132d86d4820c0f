"""Every command and every Python block of README.md, the guides and the cards runs, or is checked as far as it can be.

`document_checks` runs commands. A command that it does not know is a failure: add a way to check it there.
"""

import re
import shlex
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from clean_state import datasets_cache, fresh_accelerate  # noqa: F401 - fixtures
from document_checks import check, parses
from document_world import PUBLISHED, build_world
from documents import ROOT, Shell, blocks, inline_commands, pages
from factories import tiny_fae_mar_pipeline, tiny_fae_starflow_pipeline, tiny_fae_text_to_image_pipeline
from PIL import Image

import hf_fae
from hf_fae.cli.evaluate import evaluate


# Languages of blocks that are not run, besides directives in braces. `sh` has commands with names to fill in.
TEXT = {"bibtex", "json", "sh", "text", "yaml"}
# Checklists whose code belongs into files: tests/test_extension_guides.py follows them.
FOLLOWED = ["docs/guides/add-a-generator.md", "docs/guides/add-a-tokenizer.md"]


def _images():
    return {"pixel_values": torch.zeros(1, 3, 32, 32)}


# Pages whose Python blocks rely on names of the text -> a function that makes them.
GIVEN = {
    "docs/models/mar.md": lambda: {
        "pipe": tiny_fae_mar_pipeline(with_encoder=True),
        "image": Image.new("RGB", (32, 32), "orange"),
        "mask": Image.new("L", (32, 32), "white"),
    },
    **{f"docs/models/{name}.md": _images for name in ("fae", "drorae", "raev2", "detok", "maetok")},
    "docs/guides/evaluate.md": lambda: {
        "features": np.random.default_rng(0).normal(size=(20, 8)),
        "reference_features": np.random.default_rng(1).normal(size=(20, 8)),
    },
    "docs/models/starflow.md": lambda: {
        "pipe": tiny_fae_starflow_pipeline(),
        "latents": torch.zeros(2, 4, 4, 4),
        "class_labels": torch.tensor([0, 1]),
    },
    "docs/models/mmdit.md": lambda: {
        "pipe": tiny_fae_text_to_image_pipeline(),
        "latents": torch.zeros(2, 4, 4, 4),
        "timestep": torch.tensor(500.0),
    },
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The world as it is before the first command."""
    return build_world(tmp_path_factory.mktemp("world")).parent


@pytest.fixture
def here(original, tmp_path, monkeypatch):
    """The working directory of a page, without a network."""
    shutil.copytree(original, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(tmp_path / "world" / "hf_fae")
    monkeypatch.setenv("HF_FAE_ASSETS", "../shared/assets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "world" / PUBLISHED))


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in pages() if blocks(page) and named(page) not in FOLLOWED], ids=named)
@pytest.mark.filterwarnings("ignore")  # so few images
def test_page(page, here):
    """All blocks of a page, one after the other; later ones see the results of earlier ones."""
    shell, names = Shell(page.read_text()), {}
    if page.is_relative_to(ROOT / "docs"):
        names = {name: getattr(hf_fae, name) for name in hf_fae.__all__} | GIVEN.get(named(page), dict)()
    failures = []
    for block in blocks(page):
        try:
            if block.language == "python":
                exec(block.text, names)
            elif block.language == "bash":
                for command in shell.commands(block.text):
                    check(command.words, command.environment)
            elif block.language not in TEXT and not block.language.startswith("{"):
                raise ValueError(f"no way to check a block of {block.language!r}")
        except (Exception, SystemExit) as error:
            failures.append(f"{named(page)}:{block.line}\n{''.join(traceback.format_exception(error)[-6:])}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("page", [page for page in pages() if inline_commands(page)], ids=named)
def test_commands_in_sentences(page, here):
    for command in inline_commands(page):
        if not command.startswith("accelerate"):
            check(shlex.split(command), {})


def test_commands_of_the_papers_tables_parse(here):
    """Blocks of `sh` in the guide, where `M` is a model and `D` a data set."""
    page = ROOT / "docs" / "guides" / "evaluate.md"
    shell = Shell(page.read_text())
    commands = [one for block in blocks(page) if block.language == "sh" for one in shell.commands(block.text)]
    assert len(commands) >= 8 and all(command.words[:2] == ["hf-fae", "evaluate"] for command in commands)
    for task, *words in (command.words[2:] for command in commands):
        parses(lambda task=task, words=words: evaluate(task, [*words, "--output_dir", "outputs/x"]))


@pytest.mark.parametrize("page", pages(), ids=named)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|href)=\"([^\"#]+)", text):
        path = link[0] or link[1]
        assert re.match(r"[a-z]+:", path) or (page.parent / path).exists(), path
    if named(page) in FOLLOWED:  # they name files that their reader makes
        return
    text = re.sub(r"\]\([^)]*\)", "]", text)  # links are checked above
    folders = "training_scripts|experiments|src|benchmarks|docs|tests"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w/.-]+\.\w+", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "line",
    [
        "rm -rf outputs",
        "hf-fae inspect fae-dinov2-g | less",
        "hf-fae inspect $NAME",
        "hf-fae demo --modell x",
        "make nothing",
        "pip install -e .[nothing]",
        "python benchmarks/throughput.py --size b",
        "accelerate launch training_scripts/train_fae.py --config training_scripts/configs/nothing.yaml",
        "accelerate launch training_scripts/train_fae.py --config experiments/emoji/configs/emoji_fae.yaml --steps 1",
    ],
)
def test_what_does_not_run_fails(line, here):
    with pytest.raises((Exception, SystemExit)):
        for command in Shell("").commands(line):
            check(command.words, command.environment)
