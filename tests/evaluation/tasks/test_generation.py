"""gFID and its companions of tiny pipelines: what is drawn, what is compared, and that nothing else matters."""

import shutil

import numpy as np
import pytest
import torch
from evaluations import read_report, run, run_in_two_processes
from factories import (
    tiny_encoder,
    tiny_fae_dit_pipeline,
    tiny_fae_mar_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_kl,
    tiny_text_starflow_pipeline,
)
from PIL import Image

from hf_fae import FlowMatchEulerMaruyamaScheduler
from hf_fae.evaluation.inputs.extractors import load_extractors
from hf_fae.evaluation.metrics.distances import (
    GaussianStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from hf_fae.utils.randomness import mix_seed


@pytest.fixture
def options(pipeline_folder, judge_folder, data_folder, tmp_path):
    """A run that works."""
    return {
        "model": pipeline_folder,
        "output_dir": tmp_path / "out",
        "extractors": [f"effnet={judge_folder}"],
        "dataset_name": data_folder,
        "split": "train",
        "num_samples": 40,
        "batch_size": 16,
    }


@pytest.mark.filterwarnings("ignore")  # so few samples
def test_the_numbers_are_those_of_the_pictures(options, judge_folder, data_folder, tmp_path):
    """Drawn and compared again by hand: with the pipeline itself, from one seed for each picture."""
    result = run("generation", **options, save_images="npz")

    pipe = tiny_fae_dit_pipeline()
    generators = [torch.Generator().manual_seed(mix_seed(0, number)) for number in range(40)]
    labels = [number % 10 for number in range(40)]
    drawn = pipe(labels, generator=generators, num_inference_steps=2, output_type="np").images
    images = (drawn * 255).round().astype(np.uint8)
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert np.abs(arrays["arr_0"].astype(int) - images).max() <= 1
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)

    from datasets import load_dataset

    pictures = load_dataset(str(data_folder), split="train")["image"]
    pictures = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2)
    (extractor,) = load_extractors([str(judge_folder)])
    with torch.no_grad():
        found, known = (extractor(batch) for batch in (images, pictures))
    samples, reference = found["features"].double(), known["features"].double()
    expected = {
        "fid_effnet": frechet_distance(*(GaussianStatistics.of([f]) for f in (samples, reference))),
        "is_effnet": inception_score(found["logits"])[0],
        "kid_effnet": kernel_distance(samples, reference)[0],
    }
    expected["precision_effnet"], expected["recall_effnet"] = precision_recall(samples, reference)
    assert result.metrics == pytest.approx(
        result.metrics | expected, rel=1e-4, abs=1e-6
    )  # to fp32, in batches of other sizes
    assert result.metrics.keys() == expected.keys() | {"is_std_effnet", "kid_std_effnet"}
    assert read_report(tmp_path / "out")["metrics"] == result.metrics


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_size_does_not_matter(options, tmp_path, batch_size):
    """Not at all to those who judge; what is drawn differs in rounding, so that few 8-bit values move by 1."""
    run("generation", **options, save_images="npz")
    run("generation", **options | {"batch_size": batch_size, "output_dir": tmp_path / "again", "save_images": "npz"})
    files = [tmp_path / folder / "samples.npz" for folder in ("out", "again")]
    drawn, again = (np.load(file)["arr_0"].astype(int) for file in files)
    assert np.abs(drawn - again).max() <= 1 and (drawn != again).mean() < 1e-3

    saved = options | {"model": files[0]}
    one = run("generation", **saved | {"output_dir": tmp_path / "one"})
    if batch_size != 16:  # the parts would be others
        with pytest.raises(ValueError, match="another batch_size"):
            run("generation", **saved | {"output_dir": tmp_path / "one", "batch_size": batch_size})
    other = run("generation", **saved | {"output_dir": tmp_path / "other", "batch_size": batch_size})
    assert other.metrics == one.metrics == pytest.approx(read_report(tmp_path / "out")["metrics"], rel=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_two_processes_write_the_report_of_one(processes, options, tmp_path):
    run("generation", **options | {"num_samples": 100})
    run_in_two_processes(processes, "generation", **options | {"num_samples": 100, "output_dir": tmp_path / "two"})
    assert (tmp_path / "two" / "report.json").read_bytes() == (tmp_path / "out" / "report.json").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_that_was_cut_off_goes_on(options, tmp_path):
    run("generation", **options | {"num_samples": 100})
    report = (tmp_path / "out" / "report.json").read_bytes()
    parts = sorted((tmp_path / "out" / "parts").rglob("*.safetensors"))
    assert len(parts) == 3 + 4
    kept = {path: path.stat().st_mtime_ns for path in parts[1::2]}
    for path in parts[::2]:
        path.unlink()
    (tmp_path / "out" / "report.json").unlink()
    run("generation", **options | {"num_samples": 100})
    assert (tmp_path / "out" / "report.json").read_bytes() == report
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.mark.filterwarnings("ignore")
def test_evaluations_share_what_judges_see_in_a_reference(options, tmp_path):
    alone = run("generation", **options)
    cached = options | {"reference_cache": tmp_path / "cache"}
    first = run("generation", **cached | {"output_dir": tmp_path / "first"})
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    second = run("generation", **cached | {"output_dir": tmp_path / "second", "seed": 1})
    assert first.metrics == alone.metrics != second.metrics
    assert parts == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert not (tmp_path / "first" / "parts" / "reference").exists()
    run("generation", **cached | {"output_dir": tmp_path / "third", "max_samples": 20})  # another reference
    assert len(list((tmp_path / "cache").iterdir())) == 2

    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="reference_cache '.*file' cannot be used"):
        run("generation", **options | {"output_dir": tmp_path / "new", "reference_cache": tmp_path / "file"})
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore")
def test_seeds_and_settings_reach_the_pictures(options, tmp_path):
    def score(**changes):
        folder = tmp_path / "-".join(f"{name}={value}" for name, value in changes.items())
        return run("generation", **options | changes | {"output_dir": folder, "metrics": ["fid"]}).metrics[
            "fid_effnet"
        ]

    changes = [{"seed": 0}, {"seed": 1}, {"guidance_scale": "3"}, {"num_inference_steps": 3}, {"labels": "random"}]
    assert len({score(**change) for change in changes}) == len(changes)
    assert score(guidance_scale="[[0, 1, 3.0]]") == score(guidance_scale="3")
    assert read_report(tmp_path / "guidance_scale=3")["settings"]["guidance_scale"]["intervals"] == [[0.0, 1.0, 3.0]]
    # Without a base head 1 is the only scale: the pipeline's own, and part of the protocol.
    assert score(internal_guidance_scale="1.0") == score(seed=0)
    settings = read_report(tmp_path / "internal_guidance_scale=1.0")["settings"]
    assert (
        settings["internal_guidance_scale"]["intervals"]
        == read_report(tmp_path / "seed=0")["settings"]["internal_guidance_scale"]["intervals"]
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["flow", "mar", "kl", "sde"])
def test_any_pipeline(options, tmp_path, kind):
    pipe = {
        "flow": tiny_fae_starflow_pipeline,
        "mar": tiny_fae_mar_pipeline,
        "kl": lambda: tiny_fae_dit_pipeline(vae=tiny_kl(), num_inference_steps=2),
        "sde": lambda: tiny_fae_dit_pipeline(scheduler=FlowMatchEulerMaruyamaScheduler(), num_inference_steps=2),
    }[kind]()
    pipe.save_pretrained(tmp_path / "pipe")
    result = run("generation", **options | {"model": tmp_path / "pipe"})
    assert np.isfinite(list(result.metrics.values())).all()
    settings = [result.settings.get(name) for name in ("num_inference_steps", "num_diffusion_steps", "temperature")]
    expected = {"flow": [None, None, None], "mar": [4, 3, 1.0]}
    assert settings == expected.get(kind, [2, None, None])


@pytest.mark.filterwarnings("ignore")
def test_texts_are_the_captions_of_the_data(options, tmp_path):
    """The captions are drawn; the CLIP score is that of the pictures and of these captions."""
    from transformers import SiglipConfig, SiglipModel

    tiny_text_starflow_pipeline().save_pretrained(tmp_path / "pipe")
    clip = tmp_path / "judge"
    _save_siglip(clip, SiglipConfig, SiglipModel)
    changes = {"model": tmp_path / "pipe", "caption_column": "caption", "text_model": clip, "save_images": "npz"}
    result = run("generation", **options | changes)
    assert result.settings["num_samples"] == 40 and result.settings["labels"] is None

    from datasets import load_dataset

    from hf_fae.evaluation.inputs.text_models import ImageTextModel

    captions = load_dataset(str(options["dataset_name"]), split="train")["caption"]
    captions = [captions[row] for row in np.random.default_rng(0).permutation(90)[:40]]
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
    model = ImageTextModel.from_pretrained(str(clip))
    cosines = (model.image_embeds(images) * model.text_embeds(captions)).sum(1)
    expected = (100 * cosines.clamp_min(0)).mean().item()
    assert result.metrics[f"clip_score_{model.name}"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_rows_without_a_prompt_are_left_out_and_counted(options, data_folder, tmp_path):
    from datasets import load_dataset

    rows = load_dataset(str(data_folder), split="train")
    captions = [None if row % 3 == 0 else caption for row, caption in enumerate(rows["caption"])]
    (tmp_path / "data").mkdir()
    rows.remove_columns("caption").add_column("caption", captions).to_parquet(tmp_path / "data" / "train.parquet")
    tiny_text_starflow_pipeline().save_pretrained(tmp_path / "pipe")
    changes = {"model": tmp_path / "pipe", "caption_column": "caption", "dataset_name": tmp_path / "data"}
    result = run("generation", **options | changes | {"num_samples": 90, "metrics": ["fid"]})
    assert result.settings["num_samples"] == 60
    assert result.details == {"damaged": {"prompts": 30, "reference": 30}}


def _save_siglip(folder, config_class, model_class):
    from factories import tiny_text_encoder
    from transformers import SiglipImageProcessor

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = config_class(
        text_config={**sizes, "vocab_size": 40, "max_position_embeddings": 64, "projection_size": 32},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(1)
    model_class(config).save_pretrained(folder)
    tiny_text_encoder()[1].save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.mark.slow  # Inception sees 32 pictures of 299 pixels
@pytest.mark.filterwarnings("ignore")
def test_inception_against_statistics_of_a_file(options, inception_file, tmp_path):
    """FID and sFID by the file's own statistics; without its pictures there is nothing to take the others from."""
    random = np.random.default_rng(0)
    statistics = {"mu": random.normal(size=2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "stats.npz", **statistics, mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    changes = {
        "dataset_name": None,
        "reference": tmp_path / "stats.npz",
        "extractors": [f"inception={inception_file}"],
    }
    result = run("generation", **options | changes | {"num_samples": 16, "dataset_id": "ILSVRC/imagenet-1k"})
    assert result.metrics.keys() == {"fid", "sfid", "is", "is_std"}
    known = GaussianStatistics(statistics["mu"], statistics["sigma"])
    from safetensors.torch import load_file

    features = load_file(tmp_path / "out/parts/samples/000000000.safetensors")["inception.features"]
    assert features.shape == (16, 2048)
    assert result.metrics["fid"] == frechet_distance(GaussianStatistics.of([features]), known)
    assert (tmp_path / "out" / ".eval_results" / "hf_fae.yaml").is_file()


@pytest.mark.filterwarnings("ignore")
def test_pictures_are_kept_when_asked_for(options, tmp_path):
    run("generation", **options | {"save_images": "png", "num_samples": 10})
    files = sorted((tmp_path / "out" / "images").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(10)]
    assert Image.open(files[0]).size == (32, 32)


def test_few_samples_are_answered_with_a_warning(options):
    with pytest.warns(UserWarning, match="samples are 40 in 256 dimensions"):
        run("generation", **options | {"metrics": ["fid"]})


ERRORS = {
    "no pipeline": ({"model": "JUDGE"}, "model .* cannot be loaded"),
    "a tokenizer": ({"model": "TOKENIZER"}, "model .* cannot be loaded"),
    "nothing there": (
        {"model": "/nowhere/at/all"},
        "'/nowhere/at/all' is not a local folder and cannot be loaded",
    ),
    "no reference": ({"dataset_name": None}, "dataset_name must name the images to measure on, got None"),
    "two references": ({"reference": "NPZ"}, "dataset_name must be None where a reference is given"),
    "another size": ({"reference": "NPZ", "dataset_name": None}, "must have images of 32 x 32 .* got 16 x 16"),
    "too few samples": ({"num_samples": 9}, "num_samples must be at least 10, got 9"),
    "no batch": ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
    "unknown metric": ({"metrics": ["fid", "gfid"]}, "metrics must be among fid, .*, got 'gfid'"),
    "nothing to measure": ({"metrics": ["sfid"]}, "metrics must have one that effnet can measure .* got sfid"),
    "negative seed": ({"seed": -1}, "seed must be from 0 to"),
    "guidance of another kind": (
        {"guidance_scale": '{"channels": "3"}'},
        "guidance_scale must be what a FAEDiTPipeline",
    ),
    "few captions": (
        {"model": "TEXT", "caption_column": "caption", "split": "validation[:9]"},
        "at least 10 texts, got 9",
    ),
    "file as folder": ({"output_dir": "NPZ"}, "output_dir .* cannot be used"),
    "no number": ({"guidance_scale": "much"}, "guidance_scale must be a number or JSON, got 'much'"),
    "no scale": ({"guidance_scale": '"much"'}, "guidance_scale"),
    "no text": ({"text_model": "JUDGE"}, "text_model requires prompts"),
    "no prompts": ({"model": "TEXT"}, "caption_column must name the prompts of a pipeline that reads text, got None"),
    "steps of a flow": ({"model": "FLOW", "num_inference_steps": 3}, "num_inference_steps has no meaning for a FAE"),
    "foreign folder": ({"output_dir": "TOKENIZER"}, "output_dir must be new, empty or that of an evaluation"),
    "no samples": ({"model": "/nowhere/samples.npz"}, "model '/nowhere/samples.npz' cannot be read as an npz"),
    "few samples": ({"model": "NPZ"}, "model .* must hold at least 10 images, got 4"),
    "saved samples": (
        {"model": "NPZ", "guidance_scale": "2"},
        "guidance_scale has no meaning for saved samples",
    ),
    "no images": ({"image_column": "picture"}, "has no column 'picture'"),
    "one picture": ({"split": "validation[:1]"}, "reference must have more than 3 images, got 1"),
}


@pytest.fixture(scope="module")
def places(judge_folder, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    np.savez(folder / "16.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    tiny_text_starflow_pipeline().save_pretrained(folder / "text")
    tiny_fae_starflow_pipeline().save_pretrained(folder / "flow")
    tiny_encoder().save_pretrained(folder / "encoder")
    return {
        "JUDGE": judge_folder,
        "TOKENIZER": tokenizer_folder,
        "NPZ": folder / "16.npz",
        "TEXT": folder / "text",
        "FLOW": folder / "flow",
    }


@pytest.mark.parametrize("case", ERRORS)
def test_errors_come_before_anything_is_written(options, places, tmp_path, case):
    changes, message = ERRORS[case]
    changes = {name: places.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    before = sorted(places["TOKENIZER"].rglob("*"))
    with pytest.raises(ValueError, match=message):
        run("generation", **options | changes)
    assert not (tmp_path / "out").exists() and sorted(places["TOKENIZER"].rglob("*")) == before


@pytest.mark.filterwarnings("ignore")
def test_a_folder_holds_one_evaluation(options, tmp_path):
    run("generation", **options)
    report = (tmp_path / "out" / "report.json").read_bytes()
    with pytest.raises(ValueError, match="holds an evaluation with another seed, 0, got 1: use another output_dir"):
        run("generation", **options, seed=1)
    copy = tmp_path / "copy"
    shutil.copytree(options["model"], copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="another model"):
        run("generation", **options | {"model": copy})
    assert (tmp_path / "out" / "report.json").read_bytes() == report
