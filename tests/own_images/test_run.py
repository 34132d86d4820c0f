"""`hf-fae train` from a folder of images to a pipeline, at a tiny size, with its plan and its resumption."""

import json

import pytest
from command_line import fail
from factories import tiny_fae
from safetensors.torch import load_file
from training_fixtures import datasets_cache, fresh_accelerate, numbered_image  # noqa: F401 - fixtures

import hf_fae
from hf_fae.cli import main
from hf_fae.own_images import recipe, run, stages
from hf_fae.own_images.recipe import RECIPES, choose_recipe, load_recipe


SHORT = ("--duration", "0.00001")  # a step of each stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    for number in range(12):
        path = root / ("red" if number % 2 else "blue") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        numbered_image(number).resize((32, 24 if number % 3 else 32)).save(path)
    (root / "red" / "bad.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_fae().save_pretrained(path)
    return path


def test_recipes():
    assert (choose_recipe(4999), choose_recipe(5000)) == ("folder_small", "folder_large") == RECIPES[::-1]
    short, full = (load_recipe("folder_small", "cpu", duration) for duration in (0.1, 1.0))
    for name in ("pixels", "generator"):
        assert short[name]["max_train_steps"] == full[name]["max_train_steps"] // 10
    assert load_recipe("folder_small", "cuda", 1.0)["generator"]["train_batch_size"] == 64
    assert recipe.load_recipe("folder_small", "cpu", 1e-9)["pixels"]["lr_warmup_steps"] == 0


def test_a_dry_run_writes_nothing(folder, tokenizer, tmp_path, capsys):
    output = tmp_path / "out"
    main(["train", str(folder), "--output", str(output), "--tokenizer", str(tokenizer), "--dry-run"])
    text = capsys.readouterr().out
    assert "12 images in" in text and "1 files left out" in text and "recipe folder_small, 32 px" in text
    assert "crop pad, condition: classes" in text and "GiB of memory" in text
    assert not output.exists()


def test_to_a_pipeline_and_after_an_interruption_to_the_same(folder, tokenizer, tmp_path, monkeypatch, capsys):
    start = ["train", str(folder), "--tokenizer", str(tokenizer), *SHORT]
    main([*start, "--output", str(tmp_path / "one")])

    class Killed(BaseException):
        pass

    def run_stage(stage):
        if stage.name == "generator":
            raise Killed
        stages.run_stage(stage)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "run_stage", run_stage)
        main([*start, "--output", str(tmp_path / "two")])
    (tmp_path / "two" / "latents" / stages.MARK).unlink()  # killed before the mark of a stage that is complete
    capsys.readouterr()
    main([*start, "--output", str(tmp_path / "two")])
    assert "1 of 3: pixels (finished before)" in capsys.readouterr().out
    for part in ("transformer", "vae"):
        one, two = (
            load_file(tmp_path / name / "generator" / part / "diffusion_pytorch_model.safetensors")
            for name in ("one", "two")
        )
        assert all((value == two[key]).all() for key, value in one.items())
    pipe = hf_fae.FAEDiTPipeline.from_pretrained(tmp_path / "two" / "generator")
    assert set(pipe.label2id) == {"blue", "red"} and pipe("red", num_inference_steps=1).images[0].size == (32, 32)
    page = (tmp_path / "two" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<h3>generator: loss</h3>" in page

    assert "seed must be 0 to resume the run" in fail(capsys, *start, "--output", tmp_path / "two", "--seed", "1")


@pytest.mark.parametrize(
    ("flag", "condition"), [("--tokenizer", "classes"), ("--image-encoder", "classes"), ("--text-encoder", "captions")]
)
def test_a_model_that_cannot_be_loaded_is_told_at_once(flag, condition, tokenizer, tmp_path, capsys):
    image = numbered_image(0).resize((32, 32))
    for name in ("red", "blue"):
        (tmp_path / "images" / name).mkdir(parents=True)
        image.save(tmp_path / "images" / name / "0.png")
        (tmp_path / "images" / name / "0.txt").write_text(name)
    hf_fae.AutoencoderFAE.from_pretrained(tokenizer, image_encoder=None).save_pretrained(tmp_path / "bare")
    models = {"--tokenizer": tokenizer if flag == "--text-encoder" else tmp_path / "bare", flag: tmp_path / "absent"}
    flags = [str(value) for pair in models.items() for value in pair]
    arguments = ["train", tmp_path / "images", "--output", tmp_path / "out", "--condition", condition, *flags, *SHORT]
    assert "absent" in fail(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_captions_lead_to_text_to_image(folder, tokenizer, tmp_path):
    from hf_fae.own_images.folder import read_folder
    from hf_fae.own_images.plan import Request, make_plan

    found = read_folder(str(folder))
    with pytest.raises(ValueError, match="condition must not be 'captions' for a folder without captions"):
        make_plan(Request(str(folder), str(tokenizer), condition="captions"), found)
    for image in folder.rglob("*.png"):
        (tmp_path / image.name).write_bytes(image.read_bytes())
        (tmp_path / image.name).with_suffix(".txt").write_text("a gradient")
    plan = make_plan(Request(str(tmp_path), str(tokenizer)), read_folder(str(tmp_path)))
    *_, latents, generator = stages.make_stages(plan, tmp_path / "out")
    assert (plan.condition, generator.script) == ("captions", "train_text_to_image")
    options = dict(zip(latents.arguments[::2], latents.arguments[1::2], strict=True))
    assert (options["--max_caption_length"], options["--caption_column"]) == ("32", "caption")


def test_a_finished_stage_with_other_arguments_is_refused(tmp_path):
    stage = stages.Stage("pixels", "train_pixel_decoder", tmp_path, ("--seed", "1"))
    assert not stages.is_finished(stage)
    (tmp_path / stages.MARK).write_text(json.dumps({"arguments": ["--seed", "0"]}))
    with pytest.raises(ValueError, match="has finished 'pixels' with other arguments"):
        stages.is_finished(stage)
