"""The web demo without a browser: what its events do, with tiny models."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from damaged import damaged_pictures, encode, noise, odd_pictures
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from factories import (
    tiny_detok,
    tiny_encoder,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_mar_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_kl,
    tiny_lightning_dit,
    tiny_maetok,
    tiny_text_starflow_pipeline,
)
from PIL import Image

import hf_fae
from hf_fae.cli import main
from hf_fae.data.decoding import center_crop, decode_image
from hf_fae.evaluation.metrics.patch_similarity import similarity_map
from hf_fae.guidance import FlowGuidance, Guidance, TokenGuidance
from hf_fae.latents import decode_latents, encode_images


gr = pytest.importorskip("gradio", reason="needs gradio: pip install hf_fae[demo]")
from hf_fae import app  # noqa: E402 - needs gradio
from hf_fae.app import page, served_models  # noqa: E402
from hf_fae.app.guidance_scale import with_scale  # noqa: E402
from hf_fae.app.patch_maps import SHOWN_SIDE  # noqa: E402
from hf_fae.evaluation.inputs.spaces import SPACES  # noqa: E402


SCHEDULE = [(0.9, 1.0, 0.9), (0.0, 0.7, 2.5)]
UNET = {"block_out_channels": (8,), "norm_num_groups": 4, "down_block_types": ["DownBlock2D"]}
UNET |= {"up_block_types": ["UpBlock2D"], "layers_per_block": 1}
FACE = encode(noise(60, 40))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with pipelines of every kind, without encoders, and an encoder."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_fae_dit_pipeline(guidance_scale=SCHEDULE).save_pretrained(folder / "dit")
    tiny_fae_starflow_pipeline(guidance_scale=3.0, id2label=None).save_pretrained(folder / "flow")
    tiny_fae_mar_pipeline(guidance_scale=3.9).save_pretrained(folder / "mar")
    tiny_fae_dit_pipeline(vae=tiny_kl()).save_pretrained(folder / "kl")
    tiny_fae_mar_pipeline(vae=tiny_detok()).save_pretrained(folder / "detok")
    tokens = tiny_lightning_dit(sample_size=[1, 6])
    tiny_fae_dit_pipeline(vae=tiny_maetok(), transformer=tokens).save_pretrained(folder / "maetok")
    tiny_text_starflow_pipeline(guidance_scale=3.0).save_pretrained(folder / "text-flow")
    tiny_fae_text_to_image_pipeline(guidance_scale=[(0.0, 0.9, 1.5)]).save_pretrained(folder / "texts")
    (folder / "foreign").mkdir()
    DDPMPipeline(UNet2DModel(sample_size=8, **UNET), DDPMScheduler()).save_pretrained(folder / "foreign")
    tiny_encoder().save_pretrained(folder / "encoder")
    (folder / "broken").mkdir()
    (folder / "broken" / "model_index.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def demo(saved):
    return app.Demo(app.Models(str(saved / "encoder")))


def pixels(gallery) -> list[np.ndarray]:
    return [np.asarray(image) for image, _ in gallery["value"]]


def test_a_page_loads_nothing(saved):
    blocks = app.build([str(saved / "dit"), str(saved / "flow"), "user/absent"])
    assert not blocks.analytics_enabled
    dropdowns = [block for block in blocks.blocks.values() if getattr(block, "label", None) == "Generator"]
    assert [name for name, _ in dropdowns[0].choices] == ["dit", "flow", "user/absent"]


def test_models_are_loaded_once(saved):
    demo = app.Demo(app.Models())
    assert not demo.models.loaded
    demo.choose(str(saved / "dit"))
    assert list(demo.models.loaded) == [str(saved / "dit")]
    assert demo.models.pipeline(str(saved / "dit")) is demo.models.loaded[str(saved / "dit")]


def test_folders_of_one_name_are_told_apart(saved, tmp_path):
    (tmp_path / "dit").mkdir()
    folders = [str(saved / "dit"), str(tmp_path / "dit")]
    assert [name for name, _ in page._choices(folders)] == folders


def test_choose_a_denoiser(saved, demo):
    about, label, text, steps, scale, button = demo.choose(str(saved / "dit"))
    assert "FAEDiTPipeline" in about and "32 x 32 pixels" in about
    assert label["choices"][3] == ("class 3", 3) and len(label["choices"]) == 10
    assert label["visible"] and not text["visible"]
    assert steps["visible"] and steps["value"] == 4
    assert scale["value"] == 2.5 and "own schedule" in scale["info"]
    assert button["interactive"]


def test_choose_a_flow(saved, demo):
    about, label, text, steps, scale, _ = demo.choose(str(saved / "flow"))
    assert "FAEStarFlowPipeline" in about
    assert label["choices"][3] == ("class 3", 3)
    assert not steps["visible"]
    assert scale["value"] == 3 and "schedule" not in scale["info"]


@pytest.mark.parametrize(
    ("name", "why"), [("broken", "cannot be loaded"), ("foreign", "must be a pipeline of hf_fae")]
)
def test_choose_what_cannot_be_used(saved, demo, name, why):
    about, label, _, _, _, button = demo.choose(str(saved / name))
    assert why in about and not label["choices"] and not button["interactive"]
    with pytest.raises(gr.Error, match=why):
        demo.generate(str(saved / name), 0, "", 1, 0, 2, 1.0)


@pytest.mark.parametrize(("name", "own", "steps"), [("texts", 1.5, 4), ("text-flow", 3.0, None)])
def test_a_pipeline_that_reads_texts(saved, demo, name, own, steps):
    about, label, text, shown_steps, scale, button = demo.choose(str(saved / name))
    assert "Pipeline" in about and button["interactive"]
    assert text["visible"] and not label["visible"] and not label["choices"] and label["value"] is None
    assert scale["value"] == own and shown_steps["visible"] == (steps is not None)
    drawn = demo.generate(str(saved / name), None, " a cat ", 2, 5, steps, own)
    assert [caption for _, caption in drawn["value"]] == ["a cat, seed 5", "a cat, seed 6"]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = demo.models.pipeline(str(saved / name))(["a cat"] * 2, generator=generators).images
    for picture, image in zip(pixels(drawn), expected, strict=True):
        assert np.array_equal(picture, np.asarray(image))
    with pytest.raises(gr.Error, match="a text must be written"):
        demo.generate(str(saved / name), None, " ", 1, 0, steps, own)


def test_same_seed_same_picture(saved, demo):
    def draw(count, seed):
        return demo.generate(str(saved / "dit"), 3, "", count, seed, 2, 2.0)

    three = draw(3, 5)
    assert [caption for _, caption in three["value"]] == [f"class 3, seed {seed}" for seed in (5, 6, 7)]
    first, second, third = pixels(three)
    assert np.array_equal(pixels(draw(1, 7))[0], third)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("name", "own", "steps"), [("dit", 2.5, 4), ("flow", 3.0, None), ("mar", 3.9, 4)])
def test_defaults_are_those_of_the_pipeline(saved, demo, name, own, steps):
    pipe = demo.models.pipeline(str(saved / name))
    for scale, options in ((own, {}), (1.5, {"guidance_scale": 1.5})):
        (drawn,) = pixels(demo.generate(str(saved / name), 3, "", 1, 11, steps, scale))
        expected = pipe(class_labels=3, generator=torch.Generator().manual_seed(11), **options).images[0]
        assert np.array_equal(drawn, np.asarray(expected))


def test_another_scale_keeps_the_rest_of_a_guidance():
    own = Guidance(((0.0, 1.0, 2.5),), channels=3)
    assert with_scale(own, 2.5) is own
    assert with_scale(own, 4.0) == Guidance(((0.0, 1.0, 4.0),), channels=3)
    assert with_scale(own, 1.0) == Guidance((), channels=3)
    assert with_scale(FlowGuidance(2.0, rule="tarflow"), 1.5) == FlowGuidance(0.5, rule="tarflow")
    assert with_scale(TokenGuidance(3.9, "constant"), 2.0) == TokenGuidance(2.0, "constant")


@pytest.mark.parametrize(("name", "count"), [("dit", 3), ("flow", 4)])
def test_progress(saved, demo, name, count):
    seen = []
    demo.generate(str(saved / name), 0, "", 1, 0, 3, 1.0, progress=lambda value, desc: seen.append(value))
    assert seen == [0, *((step + 1, count) for step in range(count))]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": None}, "class must be chosen"),
        ({"label": 10}, "from 0 to 9, got 10"),
        ({"seed": None}, "seed must be a whole number"),
        ({"scale": None}, "guidance must be from 0 to 10, got None"),
        ({"scale": 11}, "guidance must be from 0 to 10, got 11"),
        ({"count": 10**9}, "number of images must be a whole number from 1 to 9"),
        ({"seed": 2**70}, "seed must be a whole number"),
        ({"steps": 0}, "number of steps must be a whole number from 1 to 250, got 0"),
        ({"steps": 10**9}, "number of steps must be a whole number from 1 to 250"),
    ],
)
def test_generate_refuses(saved, demo, changed, message):
    arguments = {"label": 1, "prompt": "", "count": 1, "seed": 0, "steps": 2, "scale": 1.0, **changed}
    with pytest.raises(gr.Error, match=message):
        demo.generate(str(saved / "dit"), **arguments)


@pytest.mark.parametrize("kind", odd_pictures())
def test_reconstruct(saved, demo, kind):
    data, _ = odd_pictures()[kind]
    original, reconstruction, scores = demo.reconstruct(str(saved / "flow"), data)
    crop = center_crop(decode_image(data), 32)
    assert np.array_equal(np.asarray(original), np.asarray(crop))
    vae = tiny_fae()
    with torch.no_grad():
        sample = vae(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 127.5 - 1).sample
    expected = (sample[0].permute(1, 2, 0).clamp(-1, 1) * 127.5 + 127.5).round()
    assert np.abs(np.asarray(reconstruction) - expected.numpy()).max() <= 1
    assert " dB" in scores and "feature cosine" in scores


@pytest.mark.parametrize(("name", "make"), [("detok", tiny_detok), ("maetok", tiny_maetok), ("kl", tiny_kl)])
def test_tokenizers_without_a_frozen_encoder(saved, demo, name, make):
    """They draw and reconstruct; similar features are not theirs to show."""
    gallery = demo.generate(str(saved / name), 1, "", 1, 0, 2, 1.0)
    assert pixels(gallery)[0].shape == (32, 32, 3)
    original, reconstruction, scores = demo.reconstruct(str(saved / name), FACE)
    vae, images = make(), torch.from_numpy(np.array(original)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        sample = decode_latents(vae, encode_images(vae, images).mode())
    expected = (sample[0].permute(1, 2, 0).clamp(-1, 1) * 127.5 + 127.5).round()
    assert np.abs(np.asarray(reconstruction) - expected.numpy()).max() <= 1
    assert " dB" in scores and "cosine" not in scores
    with pytest.raises(gr.Error, match=f"{type(vae).__name__}, which has no features of a frozen encoder"):
        demo.open_patches(str(saved / name), FACE)


@pytest.mark.parametrize("kind", [kind for kind, (_, data) in damaged_pictures().items() if data is not None])
@pytest.mark.parametrize("event", ["reconstruct", "open_patches"])
def test_bad_uploads_are_answered(saved, demo, event, kind):
    _, data = damaged_pictures()[kind]
    with pytest.raises(gr.Error) as error:
        getattr(demo, event)(str(saved / "dit"), data)
    assert "image" in error.value.message or "pixels" in error.value.message
    assert not error.value.print_exception
    assert "<" not in error.value.message  # which the page would take for HTML


def test_nothing_is_shown_before_an_upload(saved, demo):
    for event in (demo.reconstruct, demo.open_patches):
        assert event(str(saved / "dit"), None) == gr.skip()


@pytest.mark.parametrize(
    ("name", "encoder", "message"),
    [
        ("dit", None, "comes without its frozen encoder and names none"),
        ("dit", "absent/folder/here", "absent/folder/here.* cannot be loaded"),
    ],
)
def test_reconstruct_without_an_encoder(saved, name, encoder, message):
    with pytest.raises(gr.Error, match=message):
        app.Demo(app.Models(encoder)).reconstruct(str(saved / name), FACE)


def test_patches(saved, demo):
    patches, *shown = demo.open_patches(str(saved / "dit"), FACE)
    assert patches.grid == (4, 4) and "row 3, column 3" in shown[-1]
    click = SimpleNamespace(index=[150, 447.6])  # x, y: column 1, row 3 of four of 112 pixels
    picture, *heat_maps, words = demo.click_patch(patches, click)
    assert "row 4, column 2" in words and "black is" in words
    assert {image.size for image in (picture, *heat_maps)} == {(SHOWN_SIDE, SHOWN_SIDE)}
    assert picture.getpixel((112, 400)) == (0, 255, 255)  # the frame
    maps = [similarity_map(patches.spaces[space], 13) for space in SPACES]
    for heat_map, cosines in zip(heat_maps, maps, strict=True):
        assert heat_map.getpixel((168, 392)) == (252, 255, 164)  # inferno's end
        centres = [heat_map.getpixel((56 + 112 * (patch % 4), 56 + 112 * (patch // 4))) for patch in range(16)]
        red = np.array([centre[0] for centre in centres])[cosines.argsort()]
        assert (np.diff(red) >= 0).all() and red[0] < red[-1]  # as along inferno


def test_models_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_FAE_MODELS", raising=False)
    monkeypatch.setattr(served_models, "EMBEDDED", [tmp_path / "dit", tmp_path / "flow"])
    with pytest.raises(ValueError, match="--model or the variable HF_FAE_MODELS must name pipelines"):
        app.default_models()
    (tmp_path / "flow").mkdir()
    assert app.default_models() == [str(tmp_path / "flow")]
    monkeypatch.setenv("HF_FAE_MODELS", "user/dit, some/folder,")
    assert app.default_models() == ["user/dit", "some/folder"]


def fail(capsys, *argv) -> str:
    with pytest.raises(SystemExit):
        main(["demo", *argv])
    return capsys.readouterr().err


def test_command_without_models(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("HF_FAE_MODELS", raising=False)
    monkeypatch.setattr(served_models, "EMBEDDED", [tmp_path / "dit"])
    assert "--model or the variable HF_FAE_MODELS" in fail(capsys)


def test_command_passes_its_arguments(monkeypatch):
    passed = []
    monkeypatch.setattr(app, "main", lambda *args: passed.append(args))
    encoders = ["--image_encoder", "d", "--text_encoder", "e"]
    main(["demo", "--model", "a", "b", "--model", "c", *encoders, "--host", "0.0.0.0", "--port", "80"])
    main(["demo"])
    assert passed == [(["a", "b", "c"], "d", "e", "0.0.0.0", 80), (None,) * 5]


def test_command_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.split(".")[:2] == ["hf_fae", "app"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(hf_fae, "app")
    assert "the demo needs gradio: pip install hf_fae[demo]" in fail(capsys)


def test_uploads_may_be_large_pictures(saved, demo):
    file = io.BytesIO()
    Image.new("RGB", (4000, 3000), "red").save(file, "JPEG")
    original, _, _ = demo.reconstruct(str(saved / "dit"), file.getvalue())
    assert original.size == (32, 32)
