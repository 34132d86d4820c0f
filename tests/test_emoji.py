"""The scripts behind docs/experiments/emoji-256.md: recipes, export, baseline, and sample quality."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from clean_state import datasets_cache, fresh_accelerate  # noqa: F401 - fixtures
from diffusers import AutoencoderKL, DiffusionPipeline
from factories import (
    tiny_encoder,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_lightning_dit,
)
from PIL import Image

from hf_fae.latents import encode_images
from hf_fae.training.arguments import LoopArguments


ROOT = Path(__file__).parents[1]
CLASSES = ["heart", "cat-face"]


@pytest.fixture
def pictures(tmp_path):
    """A data set with the columns of Fluent Emoji that the scripts read."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    names = ["group", "subgroup", "base", "caption"]
    features = Features({"image": ImageFeature(), **{name: Value("string") for name in names}})
    for split, count in (("train", 12), ("validation", 4)):
        columns = {
            "image": [Image.effect_noise((40, 40), 20 + number).convert("RGB") for number in range(count)],
            "group": [str(number % 3 == 0) for number in range(count)],
            "subgroup": [CLASSES[number % 2] for number in range(count)],
            "caption": ["abcdefghijkl"[number] for number in range(count)],
            "base": [str(number // 3) for number in range(count)],
        }
        path = tmp_path / "pictures" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(tmp_path / "pictures")


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Tiny stand-ins for DINOv2-small and EfficientNet-Lite0, of whose 1280 features a distance takes ten seconds."""
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    tiny_encoder().save_pretrained(folder / "dinov2-small")
    sizes = {"pretrained_cfg_overlay": {"input_size": (3, 32, 32)}, "num_classes": 10}
    network = timm.create_model("test_efficientnet", **sizes)
    save_for_hf(network, folder / "efficientnet-lite0", safe_serialization=True)
    return folder


def test_recipes_change_what_there_is(script):
    emoji = script("emoji256")
    sources = (Path("out"), "encoder", "data", "text_encoder")
    stages, given = emoji.stages(*sources), emoji.stages(*sources, "fae")
    assert given.keys() == {"latents", "text-latents", "4-dit", "5-starflow", "9-text"}
    known = {field.name for field in fields(LoopArguments)}
    for recipe in emoji.RECIPES.values():
        assert recipe.keys() <= stages.keys()
        assert all(settings.keys() <= known for settings in recipe.values())
    for path, config, _ in stages.values():
        assert (ROOT / "training_scripts" / path).is_file()
        settings = yaml.safe_load((ROOT / "experiments/emoji/configs" / f"emoji256_{config}.yaml").read_text())
        assert settings.get("balance_column") == "base" or config in (
            "generator",
            "starflow",
            "text",
        )  # as their caches are


def test_export_is_small_and_loads(tmp_path, script):
    checkpoints = tmp_path / "checkpoints"
    tiny_fae().save_pretrained(tmp_path / "3-fae")
    script("emoji256").export(tmp_path, checkpoints)
    assert [folder.name for folder in checkpoints.iterdir()] == ["fae-emoji-256"]
    weights = checkpoints / "fae-emoji-256" / "diffusion_pytorch_model.safetensors"
    tokenizer = weights.read_bytes()
    tiny_fae_dit_pipeline().save_pretrained(tmp_path / "4-dit")
    tiny_fae_starflow_pipeline().save_pretrained(tmp_path / "5-starflow")
    tiny_fae_text_to_image_pipeline().save_pretrained(tmp_path / "9-text")
    for _ in range(2):  # over what is there, too
        script("emoji256").export(tmp_path, checkpoints)
    assert weights.read_bytes() == tokenizer
    for name in script("emoji256").PIPELINES.values():
        linked = list((checkpoints / name / "vae").iterdir())
        assert len(linked) == 2 and all(file.is_symlink() and file.is_file() for file in linked)
        pipe = DiffusionPipeline.from_pretrained(checkpoints / name, dtype=torch.float32)
        assert pipe.vae.image_encoder is None and pipe.vae.config.image_encoder_id == "facebook/dinov2-small"
        weights = checkpoints / name / "transformer" / "diffusion_pytorch_model.safetensors"
        assert weights.stat().st_size < 0.75 * sum(4 * p.numel() for p in pipe.transformer.parameters())
        what = {"class_labels": 0} if hasattr(pipe, "id2label") else {"prompt_embeds": torch.randn(1, 6, 24)}
        assert pipe(**what, guidance_scale=1.0).images[0].size == (32, 32)


def test_pixel_vae(tmp_path, script, pictures):
    flags = ["--dataset_name", pictures, "--output_dir", str(tmp_path / "vae"), "--resolution", "32"]
    flags += ["--block_out_channels", "16", "32", "--latent_channels", "4", "--max_train_steps", "2"]
    flags += ["--train_batch_size", "4", "--max_validation_samples", "4", "--report_to", "none"]
    script("train_vae").main(["--config", str(ROOT / "experiments/emoji/configs/emoji256_vae.yaml"), *flags])
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_images(vae, images).sample()
    assert latents.shape == (16, 4, 16, 16) and vae.config.scaling_factor != 0.18215
    assert "validation/psnr" in (tmp_path / "vae" / "log.jsonl").read_text()


@pytest.fixture
def judge(tmp_path, script, pictures):
    """Runs a task of the script that judges, with two networks, on a tiny pipeline."""
    labels = dict(enumerate(CLASSES))
    pipe = tiny_fae_dit_pipeline(with_encoder=True, id2label=labels, transformer=tiny_lightning_dit(num_classes=2))
    pipe.save_pretrained(tmp_path / "dit")
    flags = ["--model", f"tiny={tmp_path / 'dit'}", "--data", pictures, "--output", str(tmp_path / "out")]
    flags += ["--samples", "6", "--shown", "4", "--scales", "1", "--steps", "2", "4"]
    return lambda task, judges: script("quality").main([task, *flags, "--judges", str(judges)])


def test_quality_table(judge, judges, capsys):
    judge("table", judges)
    printed = capsys.readouterr().out
    assert "| validation images |" in printed and "reconstructed |" in printed and "| tiny: samples |" in printed


def test_quality_over_steps(tmp_path, judge, judges, capsys):
    judge("sweep", judges)
    assert capsys.readouterr().out.count("num_inference_steps") == 2 and (tmp_path / "out" / "sweep.png").is_file()


def test_nearest_training_images(tmp_path, judge, judges, capsys):
    judge("nearest", judges)
    printed = capsys.readouterr().out
    assert "| tiny |" in printed and "| validation images |" in printed
    with Image.open(tmp_path / "out" / "nearest-tiny.png") as sheet:
        assert sheet.width == 8 * 36


def test_pictures_of_prompts(tmp_path, script, pictures, judges, capsys):
    """The four validation images are of two emoji, each alone in its group."""
    tiny_fae_text_to_image_pipeline(guidance_scale=2.0).save_pretrained(tmp_path / "text")
    flags = ["--model", f"tiny={tmp_path / 'text'}", "--data", pictures, "--judges", str(judges), "--shown", "2"]
    script("quality").main(["prompts", *flags, "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "| images of 2 captions |" in printed and "| tiny |" in printed
    assert "| chance | 50.0% |" in printed and "| the emoji themselves | 0.0% |" in printed
    with Image.open(tmp_path / "out" / "prompts-tiny.png") as sheet:
        assert sheet.width == 2 * 36
    assert not (tmp_path / "out" / "training-features-12.safetensors").exists()
