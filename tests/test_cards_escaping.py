"""Foreign text in a card shows as it is: no HTML, no links, no code, no further lines or metadata."""

import ast
import json
import re

import pytest
import yaml
from factories import tiny_fae_dit_pipeline
from huggingface_hub import ModelCard

from hf_fae.cards import Result, TrainingRun, address_card, is_generated, render_card
from hf_fae.cards.escaping import FILTERS


HOSTILE = {
    "script": "<script>alert(1)</script>",
    "image": "![x](https://evil.example/pixel.png)",
    "link": "[click](javascript:alert(1))",
    "newlines": "cat\n\n# Heading\n\n- item",
    "fence": "cat\n```\nrm -rf /\n```",
    "head": "cat\n---\nlicense: evil\n---",
    "quote": 'a" + __import__("os").system("true") + "',
    "table": "a | b | c",
    "details": "</details><h1>big</h1>",
    "template": "{{ 7 * 7 }}{% for x in y %}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "model"
    tiny_fae_dit_pipeline(id2label={0: "plain"}).save_pretrained(folder)
    return folder


@pytest.fixture(params=HOSTILE.values(), ids=HOSTILE)
def card(request, folder):
    """A card with the same foreign text in all places, and that text."""
    text = request.param
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": text}
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"image_encoder_id": text}))
    result = Result(name=text, value=1.0, dataset=text, protocol={"sampler": text})
    run = TrainingRun(
        command=["train.py", text],
        machine=text,
        config={"name": text, text: [text]},
        datasets=[text],
        results=[result],
    )
    return render_card(folder, run, repo_id="user/model"), text


def outside_code(body):
    """Markdown without its code blocks and code spans."""
    body = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", body)


def test_nothing_foreign_is_markdown_or_html(card):
    text = outside_code(ModelCard(card[0]).text)
    assert not re.search(r"<(script|h1)|(?<!\\)\]\((javascript|https://evil)", text)
    assert re.findall(r"^#+ .*", text, flags=re.MULTILINE) == ["# model", "## Results", "## Training", "## Limits"]
    assert text.count("<details>") == text.count("</details>") == 2
    assert "rm -rf" not in re.sub(r"^- .*|^\|.*|^Hardware.*", "", text, flags=re.MULTILINE)
    assert "49" not in text.rpartition("<!--")[0]  # the signature behind it has any digits


def test_tables_keep_their_columns(card):
    rows = [row for row in card[0].splitlines() if row.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert columns == {3, 6}  # components, results


def test_head_and_snippet_stay_what_they_are(card):
    head = yaml.safe_load(card[0].split("---\n")[1])
    assert head["library_name"] == "diffusers" and "license" not in head
    snippet = re.search(r"^```python\n(.*?)^```$", card[0], flags=re.DOTALL | re.MULTILINE)[1]
    calls = [node.func for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    assert [ast.unparse(call) for call in calls] == ["DiffusionPipeline.from_pretrained", "pipe"]


def test_settings_are_the_text(card):
    block = re.search(r"^(`{3,})yaml\n(.*?)^\1$", card[0], flags=re.DOTALL | re.MULTILINE)[2]
    assert yaml.safe_load(block)["name"] == card[1]


def test_the_card_is_still_recognised(card):
    assert is_generated(card[0])
    assert 'from_pretrained("other/name"' in address_card(card[0], "other/name")


def test_usual_names_look_as_before():
    for name in ("Tinca tinca", "cat-face_2", "golden retriever", "jack-o'-lantern", "Hélix (snail)"):
        assert FILTERS["text"](name) == name
    assert FILTERS["code"]("AutoencoderFAE") == "`AutoencoderFAE`"
    assert FILTERS["hub_link"]("facebook/dinov2-base") == (
        "[facebook/dinov2-base](https://huggingface.co/facebook/dinov2-base)"
    )
