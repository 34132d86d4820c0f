"""Every training script, ended by SIGKILL, SIGTERM, SIGINT and SIGUSR1, and resumed: bit-exactly as if never ended."""

import functools
import importlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from factories import (
    tiny_encoder,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_lightning_dit,
    tiny_rae,
)
from safetensors import safe_open
from text_models import save_sentence_encoder
from training_fixtures import write_parquet
from training_runs import ADVERSARIAL, assert_equal_checkpoints, read_log

from hf_fae.utils.command_line import run

from .case import Case, fork


TESTS = Path(__file__).parents[1]
SCRIPTS = TESTS.parent / "training_scripts"
CONFIGS = TESTS / "configs"

RUNS = {
    "fae": ("train_fae.py", "smoke_fae.yaml", ["--image_encoder", "{published}/encoder"]),
    "pixel-decoder": (
        "train_pixel_decoder.py",
        "smoke_pixel_decoder.yaml",
        ["--fae", "{published}/fae", "--stage", "Ib", *ADVERSARIAL],
    ),
    "drorae-fusion": (
        "train_drorae.py",
        "smoke_drorae.yaml",
        ["--phase", "2", "--tokenizer", "{published}/rae", *ADVERSARIAL],
    ),
    "detok": ("train_detok.py", "smoke_detok.yaml", []),
    "maetok": (
        "train_maetok.py",
        "smoke_maetok.yaml",
        ["--auxiliary_targets", "dinov2:{published}/encoder=1.0"],
    ),
    "generator": (
        "train_generator.py",
        "smoke_generator.yaml",
        ["--vae", "{published}/fae", "--label_column", "kind", "--dataloader_num_workers", "1"],
    ),
    "generator-streaming": (
        "train_generator.py",
        "smoke_generator.yaml",
        ["--vae", "{published}/fae", "--label_column", "kind", "--streaming", "true", "--shuffle_block", "4"],
    ),
    "generator-latents": ("train_generator.py", "smoke_generator.yaml", ["--dataset_name", "{published}/latents"]),
    "text-to-image": (
        "train_text_to_image.py",
        "smoke_text_to_image.yaml",
        [
            *("--vae", "{published}/fae", "--caption_column", "kind"),
            *("--text_encoder", "{published}/text-encoder", "--max_caption_length", "12"),
        ],
    ),
    "text-to-image-latents": (
        "train_text_to_image.py",
        "smoke_text_to_image.yaml",
        ["--dataset_name", "{published}/latents"],
    ),
    "text-to-image-lora": (
        "train_lora.py",
        "smoke_lora.yaml",
        [
            *("--pipeline", "{published}/text-pipeline", "--image_encoder", "{published}/encoder"),
            *("--caption_column", "kind"),
        ],
    ),
    "few-steps": (
        "train_few_steps.py",
        "smoke_few_steps.yaml",
        ["--pipeline", "{published}/pipeline", "--dataset_name", "{published}/latents"],
    ),
    "starflow-text-latents": (
        "train_starflow.py",
        "smoke_starflow.yaml",
        ["--dataset_name", "{published}/latents", "--text_encoder", "{published}/text-encoder"],
    ),
    "starflow": (
        "train_starflow.py",
        "smoke_starflow.yaml",
        ["--vae", "{published}/fae", "--label_column", "kind", "--streaming", "true"],
    ),
    "starflow-latents": ("train_starflow.py", "smoke_starflow.yaml", ["--dataset_name", "{published}/latents"]),
    "mar-latents": ("train_autoregressive.py", "smoke_autoregressive.yaml", ["--dataset_name", "{published}/latents"]),
    "random-ar-latents": (
        "train_autoregressive.py",
        "smoke_autoregressive.yaml",
        ["--dataset_name", "{published}/latents", "--model", "random"],
    ),
    "fae-noisy": ("train_fae.py", "smoke_fae.yaml", ["--fae", "{published}/fae", "--latent_noise", "0.3"]),
    "lora": (
        "train_lora.py",
        "smoke_lora.yaml",
        ["--pipeline", "{published}/pipeline", "--image_encoder", "{published}/encoder", "--label_column", "kind"],
    ),
}

# One run of each script.
KILLED = [
    *("fae", "pixel-decoder", "drorae-fusion", "detok", "maetok", "generator", "generator-latents", "text-to-image"),
    *("lora", "starflow-latents", "mar-latents"),
]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STEPS = ["--max_train_steps", "8", "--checkpointing_steps", "2", "--validation_steps", "3", "--logging_steps", "3"]


def publish_models(folder: Path, data: Path) -> None:
    """What the scripts start from: encoders, a tokenizer, pipelines, cached latents."""
    tiny_encoder().save_pretrained(folder / "encoder")
    tiny_fae().save_pretrained(folder / "fae")
    tiny_rae().save_pretrained(folder / "rae")
    labels = {0: "circle", 1: "cross", 2: "heart", 3: "star"}
    pipeline = tiny_fae_dit_pipeline(transformer=tiny_lightning_dit(num_classes=4), id2label=labels)
    pipeline.save_pretrained(folder / "pipeline")
    tiny_fae_text_to_image_pipeline().save_pretrained(folder / "text-pipeline")
    save_sentence_encoder(folder / "text-encoder")
    flags = ["--vae", folder / "fae", "--dataset_name", data, "--label_column", "kind", "--caption_column", "kind"]
    flags += ["--text_encoder", folder / "text-encoder", "--max_caption_length", "12"]
    flags += ["--config", CONFIGS / "smoke_cache_latents.yaml", "--output_dir", folder / "latents"]
    assert finish("cache_latents.py", [str(flag) for flag in flags], folder / "cache.txt") == 0


def start(script: str, flags: list[str], output: Path) -> int:
    """A training script in a forked process."""

    def main():
        sys.path.insert(0, str(SCRIPTS))
        module = importlib.import_module(script.removesuffix(".py"))
        sys.argv = [script, *flags]
        run(module.main)

    return fork(main, output)


def finish(script: str, flags: list[str], output: Path) -> int:
    """The exit code of a whole run."""
    return os.waitstatus_to_exitcode(os.waitpid(start(script, flags, output), 0)[1])


@functools.cache
def prepared() -> Path:
    """Data and models for all cases of this process."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="hf-fae-kills-"))
    (folder / "data").mkdir()
    write_parquet(folder / "data")
    publish_models(folder, folder / "data")
    return folder


def flags_of(name: str, output_dir: Path) -> list[str]:
    _, config, flags = RUNS[name]
    world = prepared()
    common = ["--config", str(CONFIGS / config), "--dataset_name", str(world / "data"), "--report_to", "none"]
    common += [flag.format(published=world) for flag in flags]
    return [*common, *STEPS, "--resume_from_checkpoint", "latest", "--output_dir", str(output_dir)]


@functools.cache
def whole_run(name: str) -> Path:
    folder = prepared() / f"whole-{name}"
    assert finish(RUNS[name][0], flags_of(name, folder), folder.with_suffix(".txt")) == 0, folder
    return folder


def kill(name: str, number: int, folder: Path) -> None:
    """End the run after its first checkpoint, resume it, and compare it with one that was never ended."""
    whole, killed, output = whole_run(name), folder / "killed", folder / "output.txt"
    child = start(RUNS[name][0], flags_of(name, killed), output)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = output.read_text()
    assert "Traceback" not in text, text[-3000:]
    assert code == (-number if number == signal.SIGKILL else 128 + number), f"exit code {code}: {text[-2000:]}"
    if number != signal.SIGKILL:
        assert "is saved" in text, text[-2000:]
    assert finish(RUNS[name][0], flags_of(name, killed), output) == 0, output.read_text()[-3000:]
    assert_equal_checkpoints(whole / "checkpoint-8", killed / "checkpoint-8")
    assert read_log(whole) == read_log(killed)
    for path in sorted(whole.glob("*.safetensors")):
        assert read_tensors(path) == read_tensors(killed / path.name), path


def read_tensors(path: Path):
    """All that a safetensors file holds, to the bit; in which order its metadata are written is left to chance."""
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return file.metadata(), {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in tensors.items()}


CASES = [Case(f"{name}-{number.name}", functools.partial(kill, name, number)) for name in KILLED for number in SIGNALS]
