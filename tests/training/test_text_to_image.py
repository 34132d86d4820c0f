"""Training on captions by the scripts: a denoiser and a flow, on images and on cached latents, and LoRAs."""

import json

import pytest
import torch
from factories import tiny_fae, tiny_fae_text_to_image_pipeline
from PIL import Image
from safetensors.torch import load_file
from training_runs import assert_equal_checkpoints, last

from hf_fae import FAEStarFlowPipeline, FAETextToImagePipeline, RAEv2Transformer2DModel


SCRIPT = ("train_text_to_image", "smoke_text_to_image.yaml")


@pytest.fixture(scope="module")
def fae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fae")
    tiny_fae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    tiny_fae_text_to_image_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(fae, text_encoder, parquet_folder):
    """Flags of training on images whose captions are circle, cross, dot and ring."""
    flags = ["--vae", str(fae), "--dataset_name", str(parquet_folder), "--caption_column", "kind"]
    return [*flags, "--text_encoder", str(text_encoder), "--max_caption_length", "12"]


@pytest.fixture
def latents(tmp_path, pictures, train_here):
    train_here("cache_latents", "smoke_cache_latents.yaml", tmp_path / "latents", *pictures)
    return tmp_path / "latents"


def generate(pipe, prompt, **arguments):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images


def test_cached_latents_and_captions_train_as_the_images_do(tmp_path, pictures, latents, train_here):
    """Order, mirroring, noise and dropout are the same: what differs is the rounding of float16."""
    exact = ["--mixed_precision", "no", "--checkpointing_steps", "2"]
    cached, direct, parts = (tmp_path / name for name in ("cached", "direct", "parts"))
    train_here(*SCRIPT, cached, "--dataset_name", str(latents), *exact)
    train_here(*SCRIPT, parts, "--dataset_name", str(latents), *exact, "--max_train_steps", "2")
    train_here(*SCRIPT, parts, "--dataset_name", str(latents), *exact, "--resume_from_checkpoint", "latest")
    assert_equal_checkpoints(*(run / "checkpoint-4" for run in (cached, parts)))
    train_here(*SCRIPT, direct, *pictures, *exact, "--vae", str(latents / "tokenizer"))
    for name in ("loss", "validation/loss"):
        assert last(cached, name) == pytest.approx(last(direct, name), rel=1e-3)
    one, other = (load_file(run / "checkpoint-4" / "model.safetensors") for run in (cached, direct))
    assert one.keys() == other.keys() and not any("caption" in name for name in one if "projection" not in name)
    pipes = [FAETextToImagePipeline.from_pretrained(run) for run in (cached, direct)]
    assert (generate(pipes[0], "ring") - generate(pipes[1], "ring")).abs().mean() < 0.02


def test_train_raev2s_denoiser(tmp_path, latents, train_here):
    """Clean latents of captions, with a base head that guides; a resumed run is the whole one."""
    flags = ["--dataset_name", str(latents), "--denoiser", "raev2", "--prediction_type", "sample"]
    flags += ["--head_num_layers", "1", "--head_num_attention_heads", "2", "--head_attention_head_dim", "20"]
    flags += ["--base_head_layer", "1", "--mixed_precision", "no", "--checkpointing_steps", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here(*SCRIPT, whole, *flags)
    train_here(*SCRIPT, parts, *flags, "--max_train_steps", "2")
    train_here(*SCRIPT, parts, *flags, "--resume_from_checkpoint", "latest")
    assert_equal_checkpoints(*(run / "checkpoint-4" for run in (whole, parts)))
    pipe = FAETextToImagePipeline.from_pretrained(parts)
    assert type(pipe.transformer) is RAEv2Transformer2DModel and last(parts, "base_loss") > 0
    config = pipe.transformer.config
    assert (config.caption_channels, config.head_num_layers, config.head_attention_head_dim) == (24, 1, 20)
    plain, guided = (generate(pipe, "ring", internal_guidance_scale=scale) for scale in (1.0, 2.0))
    assert plain.shape == (1, 3, 32, 32) and not torch.equal(plain, guided)


def test_pipeline_of_a_run(tmp_path, latents, train_here, parquet_folder, fae):
    first, second = tmp_path / "first", tmp_path / "second"
    train_here(*SCRIPT, first, "--dataset_name", str(latents))
    pipe = FAETextToImagePipeline.from_pretrained(first)
    assert pipe.vae.image_encoder is None and type(pipe.text_encoder).__name__ == "BertModel"
    config = pipe.transformer.config
    assert (config.caption_channels, config.max_caption_length, config.sample_size) == (24, 12, 4)
    assert pipe.scheduler.config.shift == pytest.approx(2.5) and pipe.config.num_inference_steps == 4
    assert pipe.guidance.scale_at(0.5) == 1.5 and pipe.guidance.scale_at(0.95) == 1
    assert generate(pipe, ["ring", "a cross"]).shape == (2, 3, 32, 32)
    with Image.open(first / "validation" / "samples-0000004.png") as grid:
        assert grid.width == 2 * 36
    card = (first / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "- text: circle" in card and "2403.03206" in card

    flags = ["--pipeline", str(first), "--dataset_name", str(latents)]
    train_here(*SCRIPT, second, *flags)
    before, after = (load_file(run / "transformer/diffusion_pytorch_model.safetensors") for run in (first, second))
    assert before.keys() == after.keys()
    assert not torch.equal(before["caption_projection.weight"], after["caption_projection.weight"])
    for extra, message in (
        (["--text_encoder", "x"], "text_encoder must be None with this pipeline, which has its own, got 'x'"),
        (["--vae", "x"], "vae must be None with pipeline"),
    ):
        with pytest.raises(ValueError, match=message):
            train_here(*SCRIPT, tmp_path / "never", *flags, *extra)
    plain = ["--vae", str(fae), "--dataset_name", str(parquet_folder)]
    with pytest.raises(ValueError, match="text_encoder must name what reads the captions, got None"):
        train_here(*SCRIPT, tmp_path / "never", *plain, "--caption_column", "kind")
    with pytest.raises(ValueError, match="text_encoder 'absent' cannot be loaded"):
        train_here(*SCRIPT, tmp_path / "never", *plain, "--caption_column", "kind", "--text_encoder", "absent")
    with pytest.raises(ValueError, match="either from caption_column .*, got no captions"):
        train_here(*SCRIPT, tmp_path / "never", *plain, "--text_encoder", str(first / "text_encoder"))
    assert not (tmp_path / "never" / "log.jsonl").exists()


def test_pipeline_without_text_encoder(tmp_path, published, text_encoder, pictures, parquet_folder, train_here):
    pipe = FAETextToImagePipeline.from_pretrained(published, text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "bare")
    flags = ["--pipeline", str(tmp_path / "bare"), "--dataset_name", str(parquet_folder), "--caption_column", "kind"]
    flags += ["--image_encoder", str(tmp_path / "encoder"), "--max_train_steps", "1"]
    tiny_fae().image_encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="text_encoder must name that of the pipeline, which comes without, got None"):
        train_here(*SCRIPT, tmp_path / "never", *flags)
    train_here(*SCRIPT, tmp_path / "run", *flags, "--text_encoder", str(text_encoder))
    assert FAETextToImagePipeline.from_pretrained(tmp_path / "run").text_encoder is not None


def test_flow_of_captions(tmp_path, latents, text_encoder, train_here):
    flow = ("train_starflow", "smoke_starflow.yaml")
    flags = ["--dataset_name", str(latents), "--text_encoder", str(text_encoder), "--guidance_scale", "2.0"]
    train_here(*flow, tmp_path / "flow", *flags)
    pipe = FAEStarFlowPipeline.from_pretrained(tmp_path / "flow")
    assert pipe.transformer.config.num_classes is None and pipe.transformer.config.max_caption_length == 12
    assert generate(pipe, ["ring", "a cross"]).shape == (2, 3, 32, 32)
    assert 1.5 < last(tmp_path / "flow", "validation/bits_per_dim") < 3
    assert "- text: circle" in (tmp_path / "flow" / "README.md").read_text()
    with pytest.raises(ValueError, match="max_caption_length must be that of the latents in .*, 12, got 6"):
        train_here(*flow, tmp_path / "never", *flags, "--max_caption_length", "6")
    with pytest.raises(ValueError, match="dataset_name must have classes, but the latents in .* have none"):
        train_here(*flow, tmp_path / "never", "--dataset_name", str(latents))


class TestLora:
    @pytest.fixture
    def tune(self, tmp_path, published, encoder, train_here):
        def tune(*flags):
            common = ["--pipeline", str(published), "--image_encoder", str(encoder), "--report_to", "none"]
            train_here("train_lora", "smoke_lora.yaml", tmp_path / "lora", *common, *flags)
            return tmp_path / "lora"

        return tune

    def test_captions(self, tune, published, parquet_folder):
        run = tune("--dataset_name", str(parquet_folder), "--caption_column", "kind")
        weights = load_file(run / "pytorch_lora_weights.safetensors")
        assert any("add_q_proj" in name for name in weights) and any("ff_context" in name for name in weights)
        assert all(name.startswith("transformer.") for name in weights)
        pipe = FAETextToImagePipeline.from_pretrained(published)
        plain = generate(pipe, "ring")
        pipe.load_lora_weights(run)
        assert not torch.equal(generate(pipe, "ring"), plain)
        assert torch.equal(generate(pipe, "ring", attention_kwargs={"scale": 0.0}), plain)
        pipe.unload_lora_weights()
        assert torch.equal(generate(pipe, "ring"), plain)
        assert last(run, "validation/loss") > 0
        assert "pipe.load_lora_weights(" in (run / "README.md").read_text()

    def test_a_folder_of_captioned_images(self, tmp_path, tune):
        """As diffusers' users have it: metadata.jsonl next to the images; nothing to validate on."""
        folder = tmp_path / "pictures"
        folder.mkdir()
        lines = []
        for number in range(6):
            Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(folder / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": f"number {'abcdef'[number]}"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        run = tune("--dataset_name", str(folder), "--caption_column", "text", "--max_train_steps", "1")
        assert list((run / "validation").glob("samples-*.png"))

    def test_one_prompt_for_all(self, tune, image_folder):
        flags = ["--dataset_name", str(image_folder / "train" / "dot"), "--instance_prompt", "my dog"]
        run = tune(*flags, "--max_train_steps", "1", "--target_modules", "to_q")
        weights = load_file(run / "pytorch_lora_weights.safetensors")
        assert all(".to_q.lora_" in name for name in weights)
        card = (run / "README.md").read_text()
        assert "pipe('my dog')" in card or 'pipe("my dog")' in card


def test_pushed_to_the_hub(hub, tmp_path, fae, parquet_folder):
    """A pushed pipeline generates images by the snippet that the Hub prints, and finds its text encoder."""
    from pathlib import Path

    scripts, configs = Path(__file__).parents[2] / "training_scripts", Path(__file__).parents[1] / "configs"
    flags = [
        "--config",
        str(configs / SCRIPT[1]),
        "--vae",
        str(fae),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    flags += ["--dataset_name", str(parquet_folder), "--caption_column", "kind", "--text_encoder", "tester/words"]
    hub.run(
        "from factories import tiny_text_encoder\n"
        "for part in tiny_text_encoder():\n"
        "    part.push_to_hub('tester/words')\n"
        f"import sys; sys.path.insert(0, {str(scripts)!r})\n"
        "import train_text_to_image\n"
        f"train_text_to_image.main([*{flags!r}, '--push_to_hub', '--hub_model_id', 'tester/text'])\n"
        "import hf_fae\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('tester/text')\n"
        "assert pipe('a ring').images[0].size == (32, 32)\n"
    )
    files = hub.files("tester/text")
    assert {"README.md", "model_index.json", "text_encoder/config.json", "log.jsonl"} <= set(files)

    before = len(hub.downloads("tester/text"))
    hub.run(
        "import hf_fae\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('tester/text', text_encoder=None, tokenizer=None)\n"
        "assert pipe.text_encoder is None\n"
        "pipe.load_text_encoder()\n"
        "assert pipe('a ring').images[0].size == (32, 32)\n"
    )
    fetched = hub.downloads("tester/text")[before:]
    assert "transformer/diffusion_pytorch_model.safetensors" in fetched
    assert "text_encoder/model.safetensors" not in fetched  # but it may be many times as large
