"""Both stages of l-DeTok and MAETok as users run them: what learns, what stays, what is saved, what is refused."""

import pytest
import torch
from factories import tiny_detok, tiny_encoder, tiny_maetok
from safetensors.torch import load_file
from text_models import tiny_text_encoder
from training_runs import ADVERSARIAL, assert_equal_checkpoints, entries, last

from hf_fae import AutoencoderDeTok, AutoencoderMAETok
from hf_fae.data.images import DataArguments, ImageData


# Script -> its class, its paper, and the discriminator of the paper, after two steps of rest.
KINDS = {"train_detok": AutoencoderDeTok, "train_maetok": AutoencoderMAETok}
PAPERS = {"train_detok": "2507.15856", "train_maetok": "2502.03444"}
GAMES = {
    "train_detok": ["--discriminator", "nlayer", "--discriminator_channels", "8", "--discriminator_start", "2"],
    "train_maetok": [*ADVERSARIAL, "--consistency_weight", "4.0", "--cutout", "0.2", "--adaptive_eps", "1e-4"],
}


def config_of(script):
    return f"smoke_{script.removeprefix('train_')}.yaml"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Flags of auxiliary targets: HOG and a frozen encoder."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_encoder().save_pretrained(folder)
    return ["--auxiliary_targets", "hog=1.0", f"dinov2:{folder}=0.5"]


def changed(before, after):
    """The parts of a model in which two states differ, of the names that both have."""
    return {
        ".".join(name.split(".")[:2]) if name.startswith("decoder.mask") else name.split(".")[0]
        for name in before.keys() & after.keys()
        if not torch.equal(before[name], after[name])
    }


@pytest.mark.parametrize("script", KINDS)
def test_two_stages(script, tmp_path, image_folder, train_here, teachers):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ["--dataset_name", str(image_folder), *GAMES[script]]
    targets = teachers if script == "train_maetok" else []
    train_here(script, config_of(script), first, *flags, *targets)
    model, info = KINDS[script].from_pretrained(first, output_loading_info=True)
    assert not any(info.values()) and (model.latents_std != 1).all()
    # The averaged weights of both halves are what is saved, and where stage 2 starts: with no learning they come back.
    averages = load_file(first / "checkpoint-4" / "ema.safetensors")
    assert {name.split(".")[1] for name in averages} == {"encoder", "decoder"} | (
        {"auxiliary_decoders"} if targets else set()
    )
    assert all(torch.equal(value, model.state_dict()[name[6:]]) for name, value in averages.items())
    flags += ["--stage", "2", "--tokenizer", str(first), "--patch_size", "5"]  # the shape is that of stage 1
    train_here(script, config_of(script), tmp_path / "same", *flags, "--learning_rate", "0", "--max_train_steps", "1")
    same = KINDS[script].from_pretrained(tmp_path / "same")
    assert not changed(model.state_dict(), same.state_dict())

    train_here(script, config_of(script), second, *flags)
    tuned, info = KINDS[script].from_pretrained(second, output_loading_info=True)
    assert not any(info.values())
    # Encoder, statistics of the latents and l-DeTok's mask token stay to the bit.
    assert changed(model.state_dict(), tuned.state_dict()) == {"decoder"} | (
        {"decoder.mask_token"} if script == "train_maetok" else set()
    )
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = tuned.encode(images).latent_dist.mode()
    assert torch.equal(latents, model.encode(images).latent_dist.mode())
    assert tuned.decode(latents).sample.shape == images.shape
    if script == "train_maetok":
        assert set(model.auxiliary_decoders) == {"hog", "dinov2"} and not tuned.auxiliary_decoders
        assert model.config.auxiliary_targets == {"hog": 27, "dinov2": 32} and not tuned.config.auxiliary_targets
        assert last(first, "auxiliary/hog") > 0 and last(first, "auxiliary/dinov2") > 0
        assert last(second, "adversarial/adaptive_weight") > 0 and last(second, "adversarial/consistency") > 0
    else:
        assert last(first, "kl") > 0 and last(second, "adversarial/discriminator") > 0
        assert not any("kl" in entry for entry in entries(second))
    for folder in (first, second):
        assert last(folder, "validation/psnr") > 0 and last(folder, "validation/reconstruction") > 0
        assert (folder / "validation" / "reconstructions-0000004.png").is_file()
        assert PAPERS[script] in (folder / "README.md").read_text()


@pytest.mark.parametrize("script", KINDS)
def test_resumed_run_equals_an_uninterrupted_one(script, tmp_path, image_folder, train_here, teachers):
    flags = ["--dataset_name", str(image_folder), *GAMES[script], "--checkpointing_steps", "2"]
    flags += [*teachers, "--mask_scope", "image"] if script == "train_maetok" else []
    flags += ["--latent_statistics_images", "4", "--max_validation_samples", "2"]
    train_here(script, config_of(script), tmp_path / "whole", *flags)
    parts = tmp_path / "parts"
    train_here(script, config_of(script), parts, *flags, "--max_train_steps", "2")
    train_here(script, config_of(script), parts, *flags, "--resume_from_checkpoint", "latest")
    assert_equal_checkpoints(tmp_path / "whole" / "checkpoint-4", parts / "checkpoint-4")


@pytest.mark.parametrize("script", KINDS)
def test_learns(script, tmp_path, image_folder, train_here):
    flags = ["--dataset_name", str(image_folder), "--max_train_steps", "60", "--learning_rate", "0.003"]
    flags += ["--max_grad_norm", "0.3", "--max_mask_ratio", "0.5"]
    flags += ["--min_mask_ratio", "0"] if script == "train_maetok" else []
    flags += ["--mixed_precision", "no", "--validation_steps", "20", "--max_validation_samples", "4"]
    train_here(script, config_of(script), tmp_path, *flags, "--checkpointing_steps", "60", "--logging_steps", "5")
    losses = [entry["reconstruction"] for entry in entries(tmp_path) if "reconstruction" in entry]
    assert losses[-1] < 0.7 * losses[0], losses
    psnrs = [entry["validation/psnr"] for entry in entries(tmp_path) if "validation/psnr" in entry]
    assert psnrs[-1] > psnrs[0]


def test_latent_statistics_are_those_of_the_training_set(tmp_path, image_folder, train_here):
    flags = ["--dataset_name", str(image_folder), "--no_random_flip", "--mixed_precision", "no"]
    flags += ["--max_train_steps", "1", "--train_batch_size", "5", "--max_validation_samples", "1"]
    train_here("train_detok", "smoke_detok.yaml", tmp_path, *flags)
    model = AutoencoderDeTok.from_pretrained(tmp_path)
    data = ImageData(DataArguments(str(image_folder), resolution=32, random_flip=False))
    images = next(data.batches(32))["pixel_values"]
    with torch.no_grad():
        mean = model.encoder(images)[..., :4].double().flatten(0, 1)
    torch.testing.assert_close(model.latents_mean.flatten().double(), mean.mean(0), atol=1e-5, rtol=1e-4)
    expected = (mean.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(model.latents_std.flatten().double(), expected, atol=1e-5, rtol=1e-4)


def test_captions(tmp_path, parquet_folder, train_here):
    tiny_text_encoder()[1].save_pretrained(tmp_path / "words")
    flags = ["--dataset_name", str(parquet_folder), "--caption_column", "kind", "--caption_length", "5"]
    flags += ["--auxiliary_targets", f"caption:{tmp_path / 'words'}=0.1", "--max_validation_samples", "1"]
    train_here("train_maetok", "smoke_maetok.yaml", tmp_path / "run", *flags, "--max_train_steps", "2")
    model = AutoencoderMAETok.from_pretrained(tmp_path / "run")
    assert (model.config.caption_vocab_size, model.config.caption_length) == (29, 5)
    assert last(tmp_path / "run", "auxiliary/caption") > 0


def test_dry_run_writes_nothing(tmp_path, image_folder, train_here):
    flags = ["--dataset_name", str(image_folder), "--dry_run", "true"]
    train_here("train_maetok", "smoke_maetok.yaml", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


BAD = {
    "train_detok": [
        (["--stage", "2"], "tokenizer must name the result of stage 1, got None"),
        (["--tokenizer", "x"], "tokenizer must be None in stage 1, which makes a new one, got 'x'"),
        (["--max_mask_ratio", "1"], r"max_mask_ratio must be in \[0, 1\), got 1"),
        (["--kl_weight", "-1"], "kl_weight must be finite and not negative, got -1"),
        (["--noise_gamma", "-1"], "noise_gamma must be finite and not negative, got -1"),
        (["--resolution", "36"], "36"),
        (["--encoder_num_attention_heads", "3"], "encoder_num_attention_heads must split the width 32 .* got 3"),
        (["--streaming", "true"], "latent_statistics_images must be a number for streamed data, got None"),
        (["--latent_statistics_images", "0"], "latent_statistics_images must be positive, got 0"),
        (["--stage", "2", "--tokenizer", "DETOK", "--resolution", "64"], "resolution must be .* 32, got 64"),
    ],
    "train_maetok": [
        (["--stage", "2", "--tokenizer", "DETOK"], "tokenizer must be an AutoencoderMAETok, got AutoencoderDeTok in"),
        (["--min_mask_ratio", "0.7"], r"must rise within \[0, 1\), got 0.7 and 0.6"),
        (["--mask_std", "0"], "mask_std must be positive and finite, got 0"),
        (["--mask_steps", "0"], "mask_steps must be at least 1, got 0"),
        (["--auxiliary_targets", "hog"], "auxiliary_targets must be hog=WEIGHT, .* got 'hog'"),
        (["--auxiliary_targets", "dinov2=1"], "auxiliary_targets must be .* got 'dinov2=1'"),
        (["--auxiliary_targets", "hog:x=1"], "auxiliary_targets must be .* got 'hog:x=1'"),
        (["--auxiliary_targets", "items:x=1"], "auxiliary_targets must be .* got 'items:x=1'"),
        (["--auxiliary_targets", "hog=1", "hog=2"], "auxiliary_targets must have each name once, got 'hog' twice"),
        (["--auxiliary_targets", "hog=1", "--patch_size", "4"], "patch_size must be a multiple of 8 .* got 4"),
        (["--auxiliary_targets", "caption:x=1"], "caption_column must name the captions for the target caption"),
        (["--caption_length", "0"], "caption_length must be at least 1, got 0"),
        (["--auxiliary_targets", "hog=1", "--min_mask_ratio", "0", "--max_mask_ratio", "0"], "masked_targets must be"),
        (["--stage", "2", "--tokenizer", "MAETOK", "--auxiliary_targets", "hog=1"], "targets must be none in stage 2"),
    ],
}


@pytest.mark.parametrize("script", KINDS)
def test_refuses_what_does_not_fit_before_it_writes(script, tmp_path, image_folder, train_here):
    tiny_detok().save_pretrained(tmp_path / "detok")
    tiny_maetok().save_pretrained(tmp_path / "maetok")
    names = {"DETOK": str(tmp_path / "detok"), "MAETOK": str(tmp_path / "maetok")}
    for flags, message in BAD[script]:
        flags = ["--dataset_name", str(image_folder), *(names.get(flag, flag) for flag in flags)]
        with pytest.raises(ValueError, match=message):
            train_here(script, config_of(script), tmp_path / "never", *flags)
    assert not (tmp_path / "never").exists()
