"""`hf-fae generate`: single files, and images that are repeated from the settings stored with them."""

import numpy as np
import pytest
from command_line import fail
from factories import tiny_fae_dit_pipeline, tiny_fae_text_to_image_pipeline
from peft import LoraConfig
from PIL import Image

from hf_fae.cli import main
from hf_fae.cli.image_records import check_record, read_record, write_image
from hf_fae.generators.lora_layers import lora_weights


def run(*argv):
    main(["generate", *map(str, argv)])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    tiny_fae_text_to_image_pipeline(guidance_scale=2.0).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_single_files_are_repeated_alone(saved, tmp_path, capsys, ending):
    flags = ["--class", 3, "class 7", "--num-images-per-prompt", 2, "--guidance-scale", 1.5, "--seed", 5]
    run("--model", saved / "pipeline", *flags, "--output", tmp_path / f"{{index}}-{{name}}-{{seed}}.{ending}")
    files = sorted(tmp_path.iterdir())
    assert [file.stem for file in files] == ["0-class-3-5", "1-class-3-6", "2-class-7-7", "3-class-7-8"]
    assert f"wrote 4 images to {tmp_path}" in capsys.readouterr().out
    record = read_record(str(files[2]))
    assert record["class"] == ["class 7"] and record["seed"] == 7 and record["guidance-scale"] == 1.5
    again = tmp_path / f"again.{ending}"
    run("--from", files[2], "--output", again)
    assert np.array_equal(pixels(again), pixels(files[2])) and read_record(str(again)) == record
    run("--from", files[2], "--seed", 8, "--output", again)
    assert np.array_equal(pixels(again), pixels(files[3]))
    run("--from", files[2], "--class", 3, "--seed", 6, "--output", again)
    assert np.array_equal(pixels(again), pixels(files[1]))


def test_grids_are_repeated(texts, tmp_path):
    first, second, folder = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "new"
    run("--model", texts, "--prompt", "a cat", "-", "--negative-prompt", "dog", "--seed", 3, "--output", first)
    run("--from", first, "--output", second)
    assert np.array_equal(pixels(first), pixels(second)) and read_record(str(first)) == read_record(str(second))
    run("--from", first, "--seed", 4, "--output", second)
    assert not np.array_equal(pixels(first), pixels(second))
    run("--from", first, "--output", folder)
    assert sorted(file.name for file in folder.iterdir()) == ["a-cat-3.png", "image-4.png"]
    assert read_record(str(folder / "a-cat-3.png"))["negative-prompt"] == ["dog"]
    run("--model", texts, "--prompt", "a cat", "--no-grid", "--output", second)
    assert pixels(second).shape == pixels(folder / "a-cat-3.png").shape


def test_what_to_guide_away_from(saved, tmp_path):
    argv = ["--model", saved / "pipeline", "--class", 3, 4, "--guidance-scale", 3, "--output"]
    images = []
    for name, flags in {"null": [], "one": ["7"], "each": ["7", "class 8"]}.items():
        run(*argv, tmp_path / name, *(["--negative-class", *flags] if flags else []))
        images.append([pixels(tmp_path / name / f"class-{3 + index}-{index}.png") for index in (0, 1)])
    null, one, each = images
    assert np.array_equal(one[0], each[0])
    assert not np.array_equal(one[0], null[0]) and not np.array_equal(one[1], each[1])


def test_lora(saved, tmp_path):
    pipe = tiny_fae_dit_pipeline(with_encoder=False)
    pipe.add_classes({"my-dog": pipe.transformer.class_embedding.weight[0].detach().clone()})
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "lora", **lora_weights(pipe.transformer, ["my-dog"]))
    argv = ["--model", saved / "pipeline", "--lora", tmp_path / "lora", "--output"]
    run(*argv, tmp_path / "a.png", "--class", "my-dog", "--no-grid", "--lora-scale", 2)
    run("--from", tmp_path / "a.png", "--output", tmp_path / "b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    run("--from", tmp_path / "a.png", "--lora-scale", 0, "--class", 3, "--output", tmp_path / "b.png")
    run("--model", saved / "pipeline", "--no-grid", "--class", 3, "--output", tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--output", "{size}.png"], "may have {name}, {seed} and {index} alone, got '{size}.png'"),
        (["--output", "{seed!r}.png"], "alone, got '{seed!r}.png'"),
        (["--output", "{.png"], "is no pattern"),
        (["--output", "absent/folder/"], "'absent', which does not exist"),
        (["--output", "a.png", "--no-grid"], "in its name for 2 images without a grid, got 'a.png'"),
        (["--output", "{name}.png"], "names several of 2 images alike: add {seed}"),
        (["--output", "{seed}.png", "--grid"], "the name of one file with --grid, got '{seed}.png'"),
        (["--negative-class", "1", "2", "3"], "--negative-class must be one or 2"),
        (["--negative-class", "nobody"], "--negative-class has the unknown name 'nobody'"),
        (["--negative-prompt", "a cat"], "generates from classes: use --class"),
        (["--lora-scale", "2"], "no meaning without --lora, got 2.0"),
        (["--lora", "absent", "--lora-scale", "inf"], "must be finite, got inf"),
        (["--lora", "absent"], "--lora 'absent' cannot be loaded"),
        (["--revision", "main"], "revision must be None for the folder"),
        (["--from", "absent.png"], "--from 'absent.png' cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refuses(saved, tmp_path, monkeypatch, capsys, changed, message):
    monkeypatch.chdir(tmp_path)
    argv = ["generate", "--model", saved / "pipeline", "--class", "1", "1", "--output", "grid.png", "--device", "cpu"]
    assert message in fail(capsys, *argv, *changed)
    assert not list(tmp_path.iterdir())


def test_records_of_strangers(saved, tmp_path, capsys):
    """A record sets what images depend on and nothing else, by the rules of the flags."""
    path, image = tmp_path / "a.png", Image.new("RGB", (8, 8))
    own = {"hf_fae": "0", "model": str(saved / "pipeline"), "class": ["1"]}
    argv = ["generate", "--from", path, "--output", tmp_path / "b.png"]
    for changed, message in (
        ({"seed": "x"}, "has an unusable --seed, which may be given instead: must be a whole number"),
        ({"num-inference-steps": 10**9}, "without --no-limits"),
        ({"dtype": "int8"}, "has an unusable --dtype"),
        ({"class": []}, "has an unusable --class"),
        ({"model": ["a", "b"]}, "has an unusable --model"),
        ({"prompt": ["a"]}, "one of the arguments --class --prompt is required"),
    ):
        write_image(image, path, {**own, **changed})
        assert message in fail(capsys, *argv)
    write_image(image, path)
    assert "holds no settings of hf-fae generate" in fail(capsys, *argv)
    write_image(image, path, {**own, "output": str(tmp_path / "c.png"), "no_limits": True})
    main([str(argument) for argument in argv])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_settings_that_no_file_holds(tmp_path):
    with pytest.raises(ValueError, match="can hold 60000 characters of settings, but these have 7"):
        check_record({"prompt": ["x" * 70_000]}, tmp_path / "a.jpg")
    check_record({"prompt": ["x" * 70_000]}, tmp_path / "a.webp")


def test_required_and_spelled(saved, tmp_path, capsys):
    assert "--model --from is required" in fail(capsys, "generate", "--class", "1", "--output", tmp_path / "a.png")
    run("--model", saved / "pipeline", "--class", 1, "--num_inference_steps=2", "--output", tmp_path / "a.png")
    assert read_record(str(tmp_path / "a.png"))["num-inference-steps"] == 2
