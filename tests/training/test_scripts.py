"""The training scripts as users run them: each in a process of its own, on the smoke configs, one after the other."""

import json
from pathlib import Path

import pytest
import torch
from damaged import damaged_rows
from diffusers import AutoencoderRAE
from factories import tiny_kl
from PIL import Image
from safetensors.torch import load_file
from training_runs import ADVERSARIAL, assert_equal_checkpoints, entries, last

from hf_fae import (
    AutoencoderDRoRAE,
    AutoencoderFAE,
    AutoencoderRAEv2,
    DiTDHTransformer2DModel,
    FAEDiTPipeline,
    FAEMARPipeline,
    FAEStarFlowPipeline,
    MARTransformer2DModel,
    RAEv2Transformer2DModel,
)
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.latent_cache import CachedLatents


SCRIPTS = Path(__file__).parents[2] / "training_scripts"
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def train(processes):
    """Runs a training script of the smoke configs in a process of its own: (script, config, output folder, *flags)."""

    def run(script, config, folder, *flags):
        processes.run([SCRIPTS / script, "--config", CONFIGS / config, "--output_dir", folder, *flags])

    return run


@pytest.fixture(scope="module")
def fae(tmp_path_factory, train, encoder, parquet_folder):
    folder = tmp_path_factory.mktemp("fae")
    flags = ["--image_encoder", str(encoder), "--dataset_name", str(parquet_folder)]
    train("train_fae.py", "smoke_fae.yaml", folder, *flags)
    return folder


@pytest.fixture(scope="module")
def decoded(tmp_path_factory, train, fae, image_folder):
    folder = tmp_path_factory.mktemp("pixel-decoder")
    flags = ["--fae", str(fae), "--stage", "II", "--dataset_name", str(image_folder), *ADVERSARIAL]
    train("train_pixel_decoder.py", "smoke_pixel_decoder.yaml", folder, *flags)
    return folder


def test_train_fae(fae):
    model, info = AutoencoderFAE.from_pretrained(fae, output_loading_info=True)
    assert not any(info.values())
    assert model.config.image_encoder_id is None and model.image_encoder is not None
    assert model.features_mean.abs().sum() > 0 and (model.features_std != 1).all()
    assert (model.latents_std != 1).all()
    latents = model.encode(torch.rand(2, 3, 32, 32) * 2 - 1).latent_dist.sample()
    assert latents.shape == (2, 4, 4, 4)
    # What is saved are the averaged weights.
    name = "encoder.proj_out.weight"
    averaged = load_file(fae / "checkpoint-4" / "ema.safetensors")[f"model.{name}"]
    assert torch.equal(model.state_dict()[name], averaged)
    assert [path.name for path in fae.glob("checkpoint-*")] == ["checkpoint-4"]  # checkpoints_total_limit: 1
    assert -1 <= last(fae, "validation/feature_cosine") <= 1
    assert last(fae, "images") == 32
    assert "learning_rate: 0.001" in (fae / "config.yaml").read_text()


def test_train_pixel_decoder(fae, decoded):
    before, after = (AutoencoderFAE.from_pretrained(folder) for folder in (fae, decoded))
    changed = {
        name.split(".")[0]
        for name, value in before.state_dict().items()
        if not torch.equal(value, after.state_dict()[name])
    }
    assert changed == {"pixel_decoder"}
    assert last(decoded, "validation/psnr") > 0 and last(decoded, "validation/psnr_of_encoder_features") > 0
    # The discriminator is part of the checkpoint, not of the averages or of the result.
    state = load_file(decoded / "checkpoint-4" / "model.safetensors")
    assert any(name.startswith("adversarial.discriminator.") for name in state)
    assert "adversarial.lecam.real_mean" in state and state["adversarial.lecam.real_mean"] != 0
    assert all(name.startswith("model.") for name in load_file(decoded / "checkpoint-4" / "ema.safetensors"))
    steps = load_file(decoded / "checkpoint-4" / "optimizer.safetensors")
    assert {value.item() for name, value in steps.items() if name.endswith(".step")} == {4.0, 3.0}
    assert last(decoded, "adversarial/adaptive_weight") > 0 and last(decoded, "discriminator_grad_norm") > 0
    with Image.open(decoded / "validation" / "reconstructions-0000004.png") as grid:
        assert grid.size == (4 * 36, 2 * 36)  # 4 originals above 4 reconstructions


@pytest.fixture(scope="module")
def rae(tmp_path_factory, train, encoder, image_folder):
    folder = tmp_path_factory.mktemp("rae")
    flags = ["--image_encoder", str(encoder), "--dataset_name", str(image_folder)]
    train("train_drorae.py", "smoke_drorae.yaml", folder, *flags)
    return folder


def test_phases_of_drorae(tmp_path, rae, image_folder, train_here):
    """What a phase leaves alone stays to the bit, with a discriminator and adaptive weights, too."""
    phase2, phase3 = tmp_path / "phase2", tmp_path / "phase3"
    flags = ["--dataset_name", str(image_folder), *ADVERSARIAL]
    train_here("train_drorae", "smoke_drorae.yaml", phase2, "--phase", "2", "--tokenizer", str(rae), *flags)
    train_here("train_drorae", "smoke_drorae.yaml", phase3, "--phase", "3", "--tokenizer", str(phase2), *flags)
    models = [AutoencoderDRoRAE.from_pretrained(folder) for folder in (rae, phase2, phase3)]
    assert [model.config.fusion_type for model in models] == ["none", "experts", "experts"]
    assert models[1].config.fusion_layers == 3 and models[1].config.expert_hidden_size == 24
    first, second, third = (model.state_dict() for model in models)

    def changed(before, after):
        return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}

    assert changed(first, second) == {"latents_mean", "latents_std"}  # the decoder did not move, the latents did
    assert changed(second, third) == {"decoder"}
    assert not torch.equal(second["fusion.router.weight"], torch.zeros_like(second["fusion.router.weight"]))
    assert last(phase2, "adversarial/adaptive_weight") > 0 and last(phase3, "adversarial/adaptive_weight") > 0
    assert last(phase3, "validation/psnr") > 0 and last(phase3, "validation/reconstruction") > 0
    with Image.open(phase3 / "validation" / "reconstructions-0000004.png") as grid:
        assert grid.size == (4 * 36, 2 * 36)
    for name, text in ((rae, "2510.11690"), (phase3, "2605.10780")):
        assert text in (name / "README.md").read_text()


def test_latent_statistics_of_drorae_are_those_of_the_training_set(tmp_path, rae, image_folder, train_here):
    flags = ["--phase", "2", "--tokenizer", str(rae), "--dataset_name", str(image_folder), "--no_random_flip"]
    flags += ["--max_train_steps", "1", "--train_batch_size", "5", "--mixed_precision", "no"]
    train_here("train_drorae", "smoke_drorae.yaml", tmp_path / "run", *flags)
    model = AutoencoderDRoRAE.from_pretrained(tmp_path / "run")
    data = ImageData(DataArguments(str(image_folder), resolution=32, max_validation_samples=1, random_flip=False))
    batch = next(data.batches(32))
    assert sorted(batch["row_ids"].tolist()) == list(range(32))
    with torch.no_grad():
        latents = model.denormalize_latents(model.encode(batch["pixel_values"]).latent_dist.mode())
    variance, mean = torch.var_mean(latents.double(), dim=0, correction=0)
    torch.testing.assert_close(model.latents_mean.double(), mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.latents_std.double(), (variance + 1e-5).sqrt(), atol=1e-4, rtol=1e-3)


def test_phase_2_resumed(tmp_path, rae, image_folder, train_here):
    flags = ["--phase", "2", "--tokenizer", str(rae), "--dataset_name", str(image_folder), *ADVERSARIAL]
    flags += ["--checkpointing_steps", "2"]
    train_here("train_drorae", "smoke_drorae.yaml", tmp_path / "whole", *flags)
    parts = tmp_path / "parts"
    train_here("train_drorae", "smoke_drorae.yaml", parts, *flags, "--max_train_steps", "2")
    train_here("train_drorae", "smoke_drorae.yaml", parts, *flags, "--resume_from_checkpoint", "latest")
    assert_equal_checkpoints(tmp_path / "whole" / "checkpoint-4", parts / "checkpoint-4")


def test_phase_2_of_a_published_rae(tmp_path, image_folder, train_here):
    """diffusers' own checkpoints, which have their encoder within, take the place of phase 1."""
    rae = AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=2,
        encoder_input_size=28,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    rae.save_pretrained(tmp_path / "rae")
    flags = ["--phase", "2", "--tokenizer", str(tmp_path / "rae"), "--dataset_name", str(image_folder)]
    train_here("train_drorae", "smoke_drorae.yaml", tmp_path / "run", *flags, "--fusion_layers", "1")
    model = AutoencoderDRoRAE.from_pretrained(tmp_path / "run")
    assert len(model.fusion.experts) == 1 and model.image_encoder is not None
    assert torch.equal(model.decoder.proj_in.weight, rae.decoder.decoder_embed.weight)


def test_drorae_refuses_what_does_not_fit_before_it_writes(tmp_path, rae, fae, image_folder, train_here):
    for flags, message in (
        ([], "image_encoder must name the frozen encoder of a new tokenizer, got None"),
        (["--phase", "2"], "tokenizer must name the result of phase 1, got None"),
        (["--phase", "3", "--tokenizer", str(rae)], "tokenizer must have a fusion in phase 3, got fusion_type 'none'"),
        (["--phase", "2", "--tokenizer", str(fae)], "tokenizer must be an AutoencoderDRoRAE .* got AutoencoderFAE"),
        (["--phase", "2", "--tokenizer", str(rae), "--fusion_weight", "0"], "fusion_weight must be above 0 .* got 0"),
        (["--tokenizer", str(rae), "--decoder_noise", "-1"], "decoder_noise must be finite and not negative, got -1"),
        (["--tokenizer", str(rae), "--streaming"], "latent_statistics_images must be a number for streamed data"),
        (["--tokenizer", str(rae), "--latent_statistics_images", "0"], "latent_statistics_images must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            flags = [*flags, "--dataset_name", str(image_folder)]
            train_here("train_drorae", "smoke_drorae.yaml", tmp_path / "never", *flags)
    assert not (tmp_path / "never").exists()


def test_stages_on_cached_features(tmp_path, encoder, parquet_folder, train_here):
    """Features once through the frozen encoder, then all stages on them; one pixel decoder for all tokenizers."""
    data = ["--dataset_name", str(parquet_folder)]
    identity = ["--encoder_type", "identity", "--latent_channels", "32", "--decoder_num_layers", "0"]
    identity += ["--image_encoder", str(encoder), *data]
    features, cache, pixels, fae, whole = (tmp_path / name for name in ("features", "cache", "pixels", "fae", "whole"))
    train_here("train_fae", "smoke_fae.yaml", features, *identity, "--dry_run", "true")
    assert not features.exists()
    train_here("train_fae", "smoke_fae.yaml", features, *identity)
    train_here("cache_latents", "smoke_cache_latents.yaml", cache, "--vae", str(features), *data)
    cached = [*data, "--feature_cache", str(cache)]
    train_here("train_pixel_decoder", "smoke_pixel_decoder.yaml", pixels, "--fae", str(features), *cached)
    train_here("train_fae", "smoke_fae.yaml", fae, "--image_encoder", str(encoder), *cached)
    flags = ["--fae", str(fae), "--pixel_decoder", str(pixels), "--stage", "II", *cached]
    train_here("train_pixel_decoder", "smoke_pixel_decoder.yaml", whole, *flags, "--learning_rate", "0")

    raw, made, done = (AutoencoderFAE.from_pretrained(folder) for folder in (pixels, fae, whole))
    assert torch.equal(raw.features_mean, made.features_mean) and not torch.equal(raw.features_std, torch.ones(32))
    ours, theirs = done.pixel_decoder.state_dict(), raw.pixel_decoder.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(theirs["proj_in.weight"], made.pixel_decoder.state_dict()["proj_in.weight"])
    assert (made.latents_std != 1).all() and last(fae, "validation/feature_cosine") > -1

    train_here("cache_latents", "smoke_cache_latents.yaml", tmp_path / "latents", "--vae", str(whole), *cached)
    CachedLatents(tmp_path / "latents").check_tokenizer(done)

    # The same training on the pictures: features differ by the rounding of float16 only.
    train_here("train_fae", "smoke_fae.yaml", tmp_path / "slow", "--image_encoder", str(encoder), *data)
    assert last(tmp_path / "slow", "loss") == pytest.approx(last(fae, "loss"), rel=0.05)


def test_train_generator_resumed(tmp_path, decoded, image_folder, train, train_here):
    flags = ["--vae", str(decoded), "--dataset_name", str(image_folder), "--label_column", "label"]
    flags += ["--streaming", "true", "--checkpointing_steps", "2"]
    train_here("train_generator", "smoke_generator.yaml", tmp_path / "whole", *flags)
    first = tmp_path / "parts"
    train_here("train_generator", "smoke_generator.yaml", first, *flags, "--max_train_steps", "2")
    train("train_generator.py", "smoke_generator.yaml", first, *flags, "--resume_from_checkpoint", "latest")
    for name in ("model.safetensors", "ema.safetensors"):
        whole, parts = (load_file(tmp_path / run / "checkpoint-4" / name) for run in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)

    pipeline = FAEDiTPipeline.from_pretrained(first)
    assert pipeline.vae.image_encoder is None and not (first / "vae" / "image_encoder").exists()
    assert pipeline.id2label == {0: "circle", 1: "cross", 2: "dot", 3: "ring"}
    assert pipeline.scheduler.config.shift == pytest.approx(2.5)
    assert pipeline.transformer.config.num_classes == 4
    images = pipeline(["ring", 0], generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(32, 32)] * 2
    assert last(first, "validation/loss") > 0
    assert (first / "validation" / "samples-0000004.png").is_file()


def test_train_dit_dh_with_the_shift_of_its_latents(tmp_path, decoded, image_folder, train_here):
    flags = ["--vae", str(decoded), "--dataset_name", str(image_folder), "--label_column", "label"]
    flags += ["--denoiser", "dit_dh", "--head_num_layers", "1", "--head_num_attention_heads", "2"]
    flags += ["--head_attention_head_dim", "20", "--dimension_shift", "true", "--max_train_steps", "2"]
    with pytest.raises(ValueError, match="shift must be 1 with dimension_shift, .* got 0.4"):
        train_here("train_generator", "smoke_generator.yaml", tmp_path / "no", *flags)
    assert not (tmp_path / "no").exists()
    train_here("train_generator", "smoke_generator.yaml", tmp_path / "dit", *flags, "--shift", "1")
    pipeline = FAEDiTPipeline.from_pretrained(tmp_path / "dit")
    assert type(pipeline.transformer) is DiTDHTransformer2DModel
    assert pipeline.transformer.head_proj_in.out_channels == 40
    assert pipeline.scheduler.config.shift == 1  # of 64 numbers


def test_train_raev2(tmp_path, encoder, image_folder, train_here):
    """A decoder of two layers, then the denoiser of its latents, which resumes to the bit."""
    data = ["--dataset_name", str(image_folder)]
    flags = [*data, "--image_encoder", str(encoder), "--layers", "0", "2", "--max_train_steps", "2"]
    with pytest.raises(ValueError, match=r"layers must be given for a new decoder in phase 1 only, got \[0, 2\]"):
        train_here("train_drorae", "smoke_drorae.yaml", tmp_path / "no", *flags, "--phase", "2", "--tokenizer", "x")
    train_here("train_drorae", "smoke_drorae.yaml", tmp_path / "raev2", *flags)
    vae = AutoencoderRAEv2.from_pretrained(tmp_path / "raev2")
    assert vae.config.layers == [0, 2] and vae.config.decoder_output == "pixels"
    assert (vae.latents_std != 1).all()

    flags = [*data, "--vae", str(tmp_path / "raev2"), "--label_column", "label", "--denoiser", "raev2"]
    flags += ["--head_num_layers", "1", "--head_num_attention_heads", "2", "--head_attention_head_dim", "20"]
    flags += ["--prediction_type", "sample", "--checkpointing_steps", "2", "--internal_guidance_scale", "1.78"]
    with pytest.raises(ValueError, match="internal_guidance_scale must be 1 without base_head_layer, got 1.78"):
        train_here("train_generator", "smoke_generator.yaml", tmp_path / "no", *flags)
    flags += ["--base_head_layer", "1", "--internal_guidance_t_low", "0.1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here("train_generator", "smoke_generator.yaml", whole, *flags)
    train_here("train_generator", "smoke_generator.yaml", parts, *flags, "--max_train_steps", "2")
    train_here("train_generator", "smoke_generator.yaml", parts, *flags, "--resume_from_checkpoint", "latest")
    states = [load_file(run / "checkpoint-4" / "model.safetensors") for run in (whole, parts)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    pipeline = FAEDiTPipeline.from_pretrained(parts)
    assert type(pipeline.transformer) is RAEv2Transformer2DModel
    assert pipeline.internal_guidance.intervals == ((0.1, 1.0, 1.78),)
    assert pipeline("ring", num_inference_steps=2).images[0].size == (32, 32)
    assert last(parts, "base_loss") > 0 and last(parts, "validation/base_loss") > 0


def test_train_with_the_losses_of_lightning_dit(tmp_path, decoded, image_folder, train_here):
    flags = ["--vae", str(decoded), "--dataset_name", str(image_folder), "--label_column", "label"]
    flags += ["--timestep_sampling", "logit_normal", "--cosine_weight", "0.5", "--max_train_steps", "2"]
    with pytest.raises(ValueError, match="timestep_sampling must be uniform for prediction_type epsilon, got log"):
        others = ["--prediction_type", "epsilon", "--shift", "1"]
        train_here("train_generator", "smoke_generator.yaml", tmp_path / "no", *flags, *others)
    assert not (tmp_path / "no").exists()
    train_here("train_generator", "smoke_generator.yaml", tmp_path / "run", *flags)
    assert 0.3 < last(tmp_path / "run", "validation/cosine_distance") < 1.2  # two steps from nothing


def test_train_dit(tmp_path, decoded, image_folder, train_here):
    flags = ["--vae", str(decoded), "--dataset_name", str(image_folder), "--label_column", "label"]
    flags += ["--prediction_type", "epsilon", "--max_train_steps", "2"]
    with pytest.raises(ValueError, match="shift must be 1.0 for prediction_type epsilon, got 0.4"):
        train_here("train_generator", "smoke_generator.yaml", tmp_path / "no", *flags)
    assert not (tmp_path / "no").exists()
    train_here("train_generator", "smoke_generator.yaml", tmp_path / "dit", *flags, "--shift", "1")
    pipeline = FAEDiTPipeline.from_pretrained(tmp_path / "dit")
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler"
    assert pipeline.scheduler.config.beta_schedule == "linear"
    assert last(tmp_path / "dit", "validation/noise_error") == pytest.approx(1, abs=0.3)
    assert pipeline("ring").images[0].size == (32, 32)


def test_train_generator_on_cached_latents_and_go_on_from_its_pipeline(tmp_path, decoded, image_folder, train_here):
    latents, first, second = (tmp_path / name for name in ("latents", "first", "second"))
    flags = ["--vae", str(decoded), "--dataset_name", str(image_folder), "--label_column", "label"]
    train_here("cache_latents", "smoke_cache_latents.yaml", latents, *flags)
    # The tokenizer is that of the cache, with its statistics and without its encoder.
    train_here("train_generator", "smoke_generator.yaml", first, "--dataset_name", str(latents))
    pipeline = FAEDiTPipeline.from_pretrained(first)
    assert pipeline.vae.image_encoder is None and pipeline.id2label == {0: "circle", 1: "cross", 2: "dot", 3: "ring"}
    assert torch.equal(pipeline.vae.latents_mean, AutoencoderFAE.from_pretrained(latents / "tokenizer").latents_mean)
    assert last(first, "validation/loss") > 0 and any("loss_t/" in name for name in entries(first)[0])

    # Full fine-tuning on pictures of which two classes are new; the known ones keep their numbers.
    other = tmp_path / "pictures"
    for split in ("train", "validation"):
        for name in ("ring", "square", "star"):
            for number in range(4):
                path = other / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(path)
    encoder = ["--image_encoder", str(decoded / "image_encoder.d")]
    flags = ["--pipeline", str(first), "--dataset_name", str(other), "--label_column", "label", *encoder]
    train_here("train_generator", "smoke_generator.yaml", second, *flags)
    tuned = FAEDiTPipeline.from_pretrained(second)
    assert tuned.id2label == {0: "circle", 1: "cross", 2: "dot", 3: "ring", 4: "square", 5: "star"}
    assert tuned.transformer.config.num_classes == 6
    assert len(tuned(["star", "circle"], output_type="pt").images) == 2


def test_train_starflow_on_cached_latents_and_go_on_from_its_pipeline(tmp_path, decoded, image_folder, train_here):
    latents, first, second = (tmp_path / name for name in ("latents", "first", "second"))
    pictures = ["--dataset_name", str(image_folder), "--label_column", "label"]
    train_here("cache_latents", "smoke_cache_latents.yaml", latents, "--vae", str(decoded), *pictures)
    flags = ["--guidance_scale", "2.0", "--noise_sigma", "0.2"]
    train_here("train_starflow", "smoke_starflow.yaml", first, "--dataset_name", str(latents), *flags)
    pipeline = FAEStarFlowPipeline.from_pretrained(first)
    assert pipeline.vae.image_encoder is None and pipeline.id2label == {0: "circle", 1: "cross", 2: "dot", 3: "ring"}
    assert pipeline.guidance_scale == 2.0 and pipeline.transformer.config.noise_sigma == 0.2
    assert pipeline.transformer.config.sample_size == 4
    assert [image.size for image in pipeline(["ring", 0]).images] == [(32, 32)] * 2
    # Nearly the identity: the bits of a standard normal at unit variance and a little more.
    assert 1.5 < last(first, "validation/bits_per_dim") < 3 and last(first, "bits_per_dim") > 0
    assert (first / "validation" / "samples-0000004.png").is_file()
    assert "2506.06276" in (first / "README.md").read_text()

    encoder = ["--image_encoder", str(decoded / "image_encoder.d")]
    train_here("train_starflow", "smoke_starflow.yaml", second, "--pipeline", str(first), *pictures, *encoder)
    before, after = (load_file(run / "transformer/diffusion_pytorch_model.safetensors") for run in (first, second))
    assert before.keys() == after.keys() and not torch.equal(
        before["class_embedding.bias"], after["class_embedding.bias"]
    )
    with pytest.raises(ValueError, match="must be a FAEDiTPipeline, got a FAEStarFlowPipeline"):
        flags = ["--pipeline", str(first), *pictures]
        train_here("train_generator", "smoke_generator.yaml", tmp_path / "third", *flags)


@pytest.mark.parametrize("model", ["mar", "raster", "random"])
def test_train_autoregressive_resumed_on_cached_latents(tmp_path, decoded, image_folder, train_here, model):
    pictures = ["--dataset_name", str(image_folder), "--label_column", "label"]
    latents, whole, parts = (tmp_path / name for name in ("latents", "whole", "parts"))
    train_here("cache_latents", "smoke_cache_latents.yaml", latents, "--vae", str(decoded), *pictures)
    flags = ["--dataset_name", str(latents), "--model", model, "--checkpointing_steps", "2"]
    flags += ["--guidance_scale", "2.0", "--temperature", "0.9"]
    flags += ["--num_inference_steps", "4", "--validation_inference_steps", "2"] if model == "mar" else []
    script = ["train_autoregressive", "smoke_autoregressive.yaml"]
    train_here(*script, whole, *flags)
    train_here(*script, parts, *flags, "--max_train_steps", "2")
    train_here(*script, parts, *flags, "--resume_from_checkpoint", "latest")
    for name in ("model.safetensors", "ema.safetensors"):
        one, other = (load_file(run / "checkpoint-4" / name) for run in (whole, parts))
        assert all(torch.equal(one[key], other[key]) for key in one)

    pipeline = FAEMARPipeline.from_pretrained(whole)
    assert pipeline.vae.image_encoder is None and pipeline.id2label == {0: "circle", 1: "cross", 2: "dot", 3: "ring"}
    assert pipeline.guidance_scale == 2.0 and pipeline.config.temperature == 0.9
    assert pipeline.config.num_inference_steps == (4 if model == "mar" else None)
    assert pipeline.config.num_diffusion_steps == 4
    assert isinstance(pipeline.transformer, MARTransformer2DModel) == (model == "mar")
    assert pipeline.transformer.config.get("order", "mar") == model
    assert [image.size for image in pipeline(["ring", 0]).images] == [(32, 32)] * 2
    assert last(whole, "validation/loss") > 0 and last(whole, "noise_error") == pytest.approx(1, abs=0.3)
    assert (whole / "validation" / "samples-0000004.png").is_file()
    assert ("2406.11838" if model == "mar" else "2507.15856") in (whole / "README.md").read_text()


def test_train_autoregressive_goes_on_from_a_pipeline(tmp_path, decoded, image_folder, train_here):
    first, second = tmp_path / "first", tmp_path / "second"
    pictures = ["--dataset_name", str(image_folder), "--label_column", "label"]
    script = ["train_autoregressive", "smoke_autoregressive.yaml"]
    flags = ["--vae", str(decoded), *pictures, "--model", "random"]
    for name in ("num_inference_steps", "validation_inference_steps"):
        with pytest.raises(ValueError, match=f"{name} must be None for model 'random', .* got 4"):
            train_here(*script, tmp_path / "never", *flags, f"--{name}", "4")
    assert not (tmp_path / "never").exists()
    train_here(*script, first, *flags, "--max_train_steps", "2")
    published = ["--pipeline", str(first), *pictures, "--image_encoder", str(decoded / "image_encoder.d")]
    with pytest.raises(ValueError, match="num_inference_steps must be None for Autoregressive.*, got 4"):
        train_here(*script, second, *published, "--validation_inference_steps", "4")
    assert not (second / "log.jsonl").exists()
    train_here(*script, second, *published, "--max_train_steps", "2")
    before, after = (load_file(run / "transformer/diffusion_pytorch_model.safetensors") for run in (first, second))
    assert before.keys() == after.keys()
    assert not torch.equal(before["diffusion_head.proj_out.weight"], after["diffusion_head.proj_out.weight"])


def test_flow_on_latents_of_diffusers_own_autoencoder(tmp_path, image_folder, train_here):
    """The papers' baseline: patches of 2 x 2 latents of an `AutoencoderKL`, from a cache and from pictures."""
    tiny_kl().save_pretrained(tmp_path / "kl")
    pictures = ["--dataset_name", str(image_folder), "--label_column", "label"]
    vae = ["--vae", str(tmp_path / "kl")]
    latents, cached, direct = (tmp_path / name for name in ("latents", "cached", "direct"))
    train_here("cache_latents", "smoke_cache_latents.yaml", latents, *vae, *pictures)
    flags = ["--patch_size", "2", "--mixed_precision", "no"]
    train_here("train_starflow", "smoke_starflow.yaml", cached, "--dataset_name", str(latents), *flags)
    train_here("train_starflow", "smoke_starflow.yaml", direct, *vae, *pictures, *flags)
    bits = [last(run, "validation/bits_per_dim") for run in (cached, direct)]
    assert bits[0] == pytest.approx(bits[1], abs=1e-3)  # moments are cached in half precision
    pipeline = FAEStarFlowPipeline.from_pretrained(cached)
    assert type(pipeline.vae).__name__ == "AutoencoderKL"
    assert pipeline("ring").images[0].size == (32, 32)
    with pytest.raises(ValueError, match="update_vae must be False for an AutoencoderKL"):
        train_here("cache_latents", "smoke_cache_latents.yaml", tmp_path / "x", *vae, *pictures, "--update_vae")
    # A denoiser, too, works with it.
    train_here("train_generator", "smoke_generator.yaml", tmp_path / "dit", "--dataset_name", str(latents))
    assert FAEDiTPipeline.from_pretrained(tmp_path / "dit")("ring").images[0].size == (32, 32)


def test_decoders_are_tuned_to_the_noise_of_a_flow(tmp_path, decoded, image_folder, train_here):
    features, pixels = tmp_path / "features", tmp_path / "pixels"
    pictures, noise = ["--dataset_name", str(image_folder)], ["--latent_noise", "0.3"]
    train_here("train_fae", "smoke_fae.yaml", features, "--fae", str(decoded), *noise, *pictures)
    flags = ["--fae", str(features), "--stage", "II", *noise, *pictures]
    train_here("train_pixel_decoder", "smoke_pixel_decoder.yaml", pixels, *flags)
    models = [AutoencoderFAE.from_pretrained(folder).state_dict() for folder in (decoded, features, pixels)]
    for before, after, part in zip(models, models[1:], ("feature_decoder", "pixel_decoder")):
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {part}  # the encoder, and what latents mean, stay
    for flags, message in (
        (["--fae", str(decoded)], "latent_noise must be positive with fae, and 0 without, got 0.0"),
        (
            ["--image_encoder", "x", *noise],
            "latent_noise must be positive with fae, and 0 without, got 0.3 and fae None",
        ),
        ([], "image_encoder must name the frozen encoder of a new FAE, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            train_here("train_fae", "smoke_fae.yaml", tmp_path / "never", *flags, *pictures)
    assert not (tmp_path / "never").exists()


def test_train_on_damaged_rows_to_the_end(tmp_path, decoded, damaged_parquet, train_here, capsys):
    """An epoch and a bit of a data set with every kind of damage: all of it is in the report."""
    flags = ["--vae", str(decoded), "--dataset_name", str(damaged_parquet), "--label_column", "label"]
    flags += ["--caption_column", "caption", "--max_train_steps", "36", "--dataloader_num_workers", "1"]
    train_here("train_generator", "smoke_generator.yaml", tmp_path, *flags)
    kinds = {}
    for row, kind in sorted(damaged_rows()[1].items()):
        kinds.setdefault(kind, []).append(row)
    assert json.loads((tmp_path / "damaged_rows.json").read_text()) == kinds
    assert last(tmp_path, "images") == 36 * 8 and last(tmp_path, "corrupt_rows") == sum(map(len, kinds.values()))
    printed = capsys.readouterr().out
    assert all(f"{len(rows)} {kind}" in printed for kind, rows in kinds.items())


def test_trained_and_pushed(hub, tmp_path, encoder, parquet_folder):
    """What a training pushes is loaded from the Hub, with the card of the run."""
    run = str(tmp_path / "run")
    flags = ["--image_encoder", str(encoder), "--dataset_name", str(parquet_folder), "--output_dir", run]
    flags += ["--config", str(CONFIGS / "smoke_fae.yaml")]
    hub.run(
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import train_fae, torch\n"
        f"train_fae.main([*{flags!r}, '--push_to_hub', '--hub_model_id', 'tester/trained'])\n"
        "from hf_fae import AutoencoderFAE\n"
        f"local, pushed = (AutoencoderFAE.from_pretrained(name).state_dict() for name in ({run!r}, 'tester/trained'))\n"
        "assert all(torch.equal(value, pushed[name]) for name, value in local.items())\n"
    )
    files = hub.files("tester/trained")
    assert {"README.md", "config.json", "config.yaml", "log.jsonl"} <= set(files)
    assert not any(name.startswith("checkpoint") for name in files)


def test_result_has_a_card(fae, decoded):
    for folder, words in (
        (fae, ["from_pretrained(", "learning_rate: 0.001", "feature_cosine", "training_scripts/train_fae.py"]),
        (decoded, ["reconstructions-0000004.png", "discriminator: patch", "psnr"]),
    ):
        card = (folder / "README.md").read_text()
        assert [word for word in words if word not in card] == []


def test_push_to_hub_without_a_name(tmp_path, train_here):
    with pytest.raises(ValueError, match="hub_model_id must name the repository for push_to_hub, got None"):
        train_here(
            "train_fae", "smoke_fae.yaml", tmp_path, "--image_encoder", "x", "--dataset_name", "x", "--push_to_hub"
        )


def test_dry_run_writes_nothing(tmp_path, fae, parquet_folder, train_here, capsys):
    flags = ["--vae", str(fae), "--dataset_name", str(parquet_folder), "--label_column", "kind", "--dry_run"]
    train_here("train_generator", "smoke_generator.yaml", tmp_path / "run", *flags)
    output = capsys.readouterr().out
    assert '"loss"' in output and "validation/loss" in output
    assert not (tmp_path / "run").exists()
