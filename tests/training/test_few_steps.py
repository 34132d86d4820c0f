"""Few-step training by its script: from a flow model, by each kind of velocity, and resumed."""

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from factories import (
    tiny_dit_pipeline,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_lightning_dit,
    tiny_raev2_dit,
)
from training_runs import assert_equal_checkpoints, last

from hf_fae import FAEDiTPipeline, FAETextToImagePipeline, FlowMatchEulerMaruyamaScheduler


SCRIPT = ("train_few_steps", "smoke_few_steps.yaml")
NAMES = {0: "circle", 1: "cross", 2: "dot", 3: "ring"}


@pytest.fixture(scope="module")
def fae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fae")
    tiny_fae().save_pretrained(folder)
    return folder


@pytest.fixture
def latents(tmp_path, fae, image_folder, train_here):
    flags = ["--vae", str(fae), "--dataset_name", str(image_folder), "--label_column", "label"]
    train_here("cache_latents", "smoke_cache_latents.yaml", tmp_path / "latents", *flags)
    return tmp_path / "latents"


@pytest.fixture
def flow(tmp_path):
    """A pipeline of velocities with another scheduler than MeanFlow's, and with guidance."""
    folder = tmp_path / "flow"
    tiny_fae_dit_pipeline(
        transformer=tiny_lightning_dit(num_classes=4),
        scheduler=FlowMatchEulerMaruyamaScheduler(shift=2.5),
        id2label=NAMES,
        guidance_scale=2.0,
        vae=tiny_fae(with_encoder=False),
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("velocity", ["data", "own", "teacher"])
def test_from_a_flow_model(velocity, tmp_path, flow, latents, train_here):
    flags = ["--pipeline", str(flow), "--dataset_name", str(latents), "--velocity", velocity, "--omega", "1.5"]
    train_here(*SCRIPT, tmp_path / "run", *flags)
    pipe = FAEDiTPipeline.from_pretrained(tmp_path / "run")
    assert pipe.transformer.config.use_meanflow and pipe.id2label == NAMES
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler and pipe.scheduler.config.shift == 2.5
    assert pipe.guidance_scale == 1 and pipe.config.num_inference_steps == 1
    assert pipe.transformer.interval_embedding.linear_2.weight.abs().max() > 0
    images = pipe(["ring", "dot"], output_type="pt").images
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
    for name in ("mse_instant", "mse_interval", "derivative_square", "validation/mse"):
        assert last(tmp_path / "run", name) > 0
    if velocity == "own":  # its result is continued, and stays what it is
        flags[1] = str(tmp_path / "run")
        train_here(*SCRIPT, tmp_path / "more", *flags, "--num_inference_steps", "2")
        assert FAEDiTPipeline.from_pretrained(tmp_path / "more").config.num_inference_steps == 2


def test_resumed_it_is_the_same_to_the_bit(tmp_path, flow, latents, train_here):
    flags = ["--pipeline", str(flow), "--dataset_name", str(latents)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here(*SCRIPT, whole, *flags)
    train_here(*SCRIPT, parts, *flags, "--max_train_steps", "2")
    train_here(*SCRIPT, parts, *flags, "--resume_from_checkpoint", "latest")
    assert_equal_checkpoints(*(run / "checkpoint-4" for run in (whole, parts)))


def test_from_scratch(tmp_path, latents, train_here):
    flags = ["--dataset_name", str(latents), "--use_meanflow", "true", "--num_inference_steps", "1"]
    train_here("train_generator", "smoke_generator.yaml", tmp_path / "run", *flags)
    pipe = FAEDiTPipeline.from_pretrained(tmp_path / "run")
    assert pipe.transformer.config.use_meanflow and last(tmp_path / "run", "mse_instant") > 0
    assert pipe("ring", output_type="pt").images.isfinite().all()


def test_texts(tmp_path, fae, text_encoder, parquet_folder, train_here):
    tiny_fae_text_to_image_pipeline(vae=tiny_fae()).save_pretrained(tmp_path / "flow")
    flags = ["--pipeline", str(tmp_path / "flow"), "--dataset_name", str(parquet_folder), "--caption_column", "kind"]
    train_here(*SCRIPT, tmp_path / "run", *flags)
    pipe = FAETextToImagePipeline.from_pretrained(tmp_path / "run")
    assert pipe.transformer.config.use_meanflow
    assert pipe("ring", output_type="pt").images.isfinite().all()


def test_a_base_head_is_left_out(tmp_path, latents, train_here):
    transformer = tiny_raev2_dit(num_classes=4)
    tiny_fae_dit_pipeline(
        transformer=transformer, id2label=NAMES, internal_guidance_scale=1.5, vae=tiny_fae(with_encoder=False)
    ).save_pretrained(tmp_path / "flow")
    flags = ["--pipeline", str(tmp_path / "flow"), "--dataset_name", str(latents)]
    train_here(*SCRIPT, tmp_path / "run", *flags)
    pipe = FAEDiTPipeline.from_pretrained(tmp_path / "run")
    assert pipe.transformer.base_head is None and not pipe.internal_guidance.is_active


def test_what_cannot_be_trained(tmp_path, latents, flow, train_here):
    tiny_dit_pipeline().save_pretrained(tmp_path / "ddpm")
    models = {name: tiny_lightning_dit(num_classes=4) for name in ("transformer", "guidance_transformer")}
    tiny_fae_dit_pipeline(**models, id2label=NAMES).save_pretrained(tmp_path / "weak")
    for pipeline, flags, message in (
        ("ddpm", [], "must be one of flow matching, got a DDPMScheduler"),
        ("weak", [], "must have no guidance_transformer"),
        ("flow", ["--kappa", "1"], "kappa must be below 1, got 1.0"),
        ("flow", ["--instant_share", "2"], "instant_share must be from 0 to 1, got 2.0"),
        ("flow", ["--num_inference_steps", "0"], "num_inference_steps must be at least 1, got 0"),
    ):
        data = ["--pipeline", str(tmp_path / pipeline), "--dataset_name", str(latents)]
        with pytest.raises(ValueError, match=message):
            train_here(*SCRIPT, tmp_path / "run", *data, *flags)
        assert not (tmp_path / "run").exists()
    for flags, message in (
        (["--sampler", "sde"], "sampler must be ode with use_meanflow, got sde"),
        (["--cosine_weight", "1"], "cosine_weight must be 0.0 with use_meanflow, got 1.0"),
    ):
        flags = ["--dataset_name", str(latents), "--use_meanflow", "true", *flags]
        with pytest.raises(ValueError, match=message):
            train_here("train_generator", "smoke_generator.yaml", tmp_path / "run", *flags)
