"""A VAE and VA-VAE by their script: continued, resumed to the bit, and ready for generators."""

import pytest
import torch
from diffusers import AutoencoderKL
from training_runs import assert_equal_checkpoints, last


SCRIPT = ("train_vae", "smoke_vae.yaml")


@pytest.fixture
def images(parquet_folder):
    return ["--dataset_name", str(parquet_folder)]


def test_vae(tmp_path, images, train_here):
    train_here(*SCRIPT, tmp_path / "vae", *images)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.latent_channels == 4 and vae.config.scaling_factor != 0.18215
    assert last(tmp_path / "vae", "validation/psnr") > 0 and last(tmp_path / "vae", "kl") > 0
    train_here(
        "cache_latents", "smoke_cache_latents.yaml", tmp_path / "latents", *images, "--vae", str(tmp_path / "vae")
    )


def test_va_vae_resumed_and_continued(tmp_path, images, encoder, train_here):
    aligned = [*images, "--alignment_encoder", str(encoder), "--alignment_weight", "0.5", "--cosine_margin", "0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here(*SCRIPT, whole, *aligned)
    assert last(whole, "alignment") > 0
    train_here(*SCRIPT, parts, *aligned, "--max_train_steps", "2")
    train_here(*SCRIPT, parts, *aligned, "--resume_from_checkpoint", "latest")
    assert_equal_checkpoints(*(run / "checkpoint-4" for run in (whole, parts)))
    train_here(
        *SCRIPT, tmp_path / "next", *aligned, "--vae", str(whole), "--max_train_steps", "1", "--learning_rate", "0"
    )
    one, other = (AutoencoderKL.from_pretrained(folder).state_dict() for folder in (whole, tmp_path / "next"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bad_arguments(tmp_path, images, train_here):
    for flags, message in (
        (["--kl_weight", "-1"], "kl_weight must be finite and not negative, got -1.0"),
        (["--alignment_encoder", str(tmp_path / "absent")], "absent"),
        (["--vae", str(tmp_path / "absent")], "absent"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            train_here(*SCRIPT, tmp_path / "vae", *images, *flags)
        assert not (tmp_path / "vae").exists()
