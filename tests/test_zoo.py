"""The zoo: its table in the docs, its rows, and loading over HTTP from the files of a Hub."""

import importlib
import inspect
import json
from pathlib import Path

import pytest
from hub_server import Blob
from huggingface_hub import ModelCard
from published import publish

from hf_fae.cards.folder_facts import PAPERS
from hf_fae.zoo import ZOO, find


NAMES = ["rae-dinov2-b", "lightningdit-xl-800ep", "mar-b-detok", "sit-xl-2", "dit-xl-2-256", "starflow-3b-text"]
CLIENT = """
import dataclasses, json, sys, torch
import hf_fae
from hf_fae.zoo import ZOO

for name, settings in {settings}.items():
    ZOO[name] = dataclasses.replace(ZOO[name], settings=settings)
results = {{}}
for name in {names}:
    model = hf_fae.load_published(name)
    torch.manual_seed(0)
    if not hasattr(model, "transformer"):
        with torch.no_grad():
            images = model(torch.rand(1, 3, 64, 64)).sample
    elif model.reads_text:
        embeds = torch.ones(1, 5, 24)
        images = model(prompt_embeds=embeds, negative_prompt_embeds=0 * embeds, output_type="pt").images
    else:
        steps = dict(num_diffusion_steps=2) if name.startswith("mar") else {{}}
        images = model(class_labels=1, num_inference_steps=2, output_type="pt", **steps).images
    results[name] = [list(images.shape), images.mean().item(), images.std().item()]
print(json.dumps(results))
"""
PUSH = """
model.push_to_hub("tester/pushed")
from hf_fae.cli import main
main(["convert", "mar-b-detok", "--output", "converted", "--push_to_hub", "tester/converted"])
"""


@pytest.mark.parametrize("name", ZOO)
def test_rows(name):
    entry = ZOO[name]
    module, _, function = entry.loader.partition(":")
    arguments = inspect.signature(getattr(importlib.import_module(f"hf_fae.convert.{module}"), function)).parameters
    given = {*entry.files, *entry.models, *(["vae"] if entry.tokenizer else [])}
    if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        given |= entry.settings.keys()
    assert given <= arguments.keys()
    assert entry.tokenizer is None or entry.tokenizer in ZOO
    assert entry.paper in PAPERS
    json.dumps(entry.settings)


def docs_table() -> str:
    """Names, what they are, figures, licences and addresses, as docs/zoo.md has them."""

    def line(*cells):
        return f"| {' | '.join(cells)} |"

    lines = [line("name", "figure", "licence", "paper", "published at"), "|---" * 5 + "|"]
    for name, entry in ZOO.items():
        kind = f"`{name}`" + (f" on `{entry.tokenizer}`" if entry.tokenizer else "")
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})"
        place = entry.address.removeprefix("https://").removeprefix("huggingface.co/")
        needed = ", your files" if entry.needs_files else ""
        licence = entry.license or "*none stated*"
        lines.append(line(kind, entry.figure or "", licence, paper, f"[{place}]({entry.address}){needed}"))
    return "\n".join(lines)


def test_docs_have_the_table():
    assert docs_table() in (Path(__file__).parents[1] / "docs" / "zoo.md").read_text()


def test_find():
    assert find("mar-b") is ZOO["mar-b"]
    with pytest.raises(ValueError, match=r"got 'lightningdit-xl'; did you mean 'lightningdit-xl-\d+ep' or"):
        find("lightningdit-xl")
    with pytest.raises(ValueError, match=r"name must be of published weights, got '\?'; see `hf-fae zoo`"):
        find("?")


def test_over_http(hub, tmp_path, oracle):
    """One client loads and generates, a second one does so without a Hub, from the same cache."""
    settings = {}
    for name in NAMES:
        settings |= {key: row.settings for key, row in publish(name, tmp_path / "files", oracle).items()}
    repositories = {path.parent.relative_to(tmp_path / "files") for path in (tmp_path / "files").glob("*/*/*")}
    for repository in map(str, repositories):
        owner, name = repository.split("/")
        hub.create_repository({"organization": owner, "name": name})
        root = tmp_path / "files" / repository
        tree = {
            path.relative_to(root).as_posix(): Blob(path.read_bytes(), is_lfs=path.suffix != ".json")
            for path in root.rglob("*")
            if path.is_file()
        }
        hub.repository(repository).commit(tree, "files")
    home, client = tmp_path / "home", CLIENT.format(settings=settings, names=NAMES)
    first = json.loads(hub.run(client + PUSH, home=home).splitlines()[0])
    assert all(shape[0] == 1 and std > 0 for shape, _, std in first.values())
    assert hub.downloads("hustvl/lightningdit-xl-imagenet256-800ep") == ["lightningdit-xl-imagenet256-800ep.pt"]
    requests = len(hub.requests)
    offline = "import huggingface_hub.constants\nhuggingface_hub.constants.HF_HUB_OFFLINE = True\n"
    again = json.loads(hub.run(offline + client, home=home).splitlines()[-1])
    assert again == first
    assert len(hub.requests) == requests
    (kept,) = (home / "assets" / "hf_fae").glob("mar-b-detok-*[0-9a-f]")
    origins = json.loads((kept / "published.json").read_text())
    assert [origin["revision"] for origin in origins] == 2 * [hub.head("jjiaweiyang/l-DeTok")]
    # Pushed either way, they keep where they come from and under which licence.
    assert json.loads(hub.files("tester/converted")["published.json"]) == origins
    assert ModelCard(hub.files("tester/converted")["README.md"].decode()).data.license == "mit"
    pushed = ModelCard(hub.files("tester/pushed")["README.md"].decode())
    assert pushed.data.license == "apple-amlr"
    assert "`starflow_3B_t2i_256x256.pth` of <https://huggingface.co/apple/starflow>" in pushed.text
    assert "vae/diffusion_pytorch_model.safetensors" in hub.files("tester/pushed")
