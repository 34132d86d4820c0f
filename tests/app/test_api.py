"""The demo's API as `gradio_client` uses it, without the page: its choices and bounds are the server's."""

import pytest
from factories import tiny_fae_dit_pipeline, tiny_fae_text_to_image_pipeline


pytest.importorskip("gradio", reason="needs gradio: pip install hf_fae[demo]")
from gradio_client import Client  # noqa: E402 - comes with gradio
from gradio_client.exceptions import AppError  # noqa: E402

from hf_fae.app import build  # noqa: E402


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    names = {0: "tench", 3: "golden retriever"}
    tiny_fae_dit_pipeline(id2label=names, num_inference_steps=2).save_pretrained(folder / "classes")
    tiny_fae_text_to_image_pipeline(num_inference_steps=2).save_pretrained(folder / "texts")
    models = [str(folder / "classes"), str(folder / "texts")]
    page = build(models)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield Client(url, verbose=False), models
    page.close()


def generate(server, kind=0, **changed):
    client, models = server
    arguments = {
        "model": models[kind],
        "class": 3,
        "text": "a cat",
        "images": 2,
        "seed": 0,
        "steps": 2,
        "guidance": 1.0,
    }
    return client.predict(*(arguments | changed).values(), api_name="/generate")["value"]


@pytest.mark.parametrize("label", [3, "3", "golden retriever"])
def test_a_class_by_number_or_name(server, label):
    images = generate(server, **{"class": label})
    assert [image["caption"] for image in images] == ["golden retriever, seed 0", "golden retriever, seed 1"]


def test_a_text(server):
    images = generate(server, kind=1)
    assert [image["caption"] for image in images] == ["a cat, seed 0", "a cat, seed 1"]


@pytest.mark.parametrize(
    "kind, changed, message",
    [
        (0, {"class": "cat"}, "class has the unknown name"),
        (0, {"class": 10}, "class must be from 0 to 9, got 10"),
        (0, {"images": 10**9}, "1000000000"),
        (0, {"steps": 10**9}, "1000000000"),
        (0, {"seed": 2**70}, str(2**70)),
        (0, {"guidance": 1e9}, "1000000000"),
        (1, {"text": "x" * 10**6}, "1000"),
        (0, {"model": "/etc"}, "not in the list of choices"),
    ],
)
def test_bounds_are_the_servers(server, kind, changed, message):
    with pytest.raises(AppError, match=message):
        generate(server, kind, **changed)
