"""SIGKILL at random moments: nothing is lost, and no image is skipped or seen twice."""

import json
import time
from pathlib import Path

import pytest
from damaged import damaged_rows
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
from training_runs import ADVERSARIAL, assert_equal_checkpoints, read_log


TESTS = Path(__file__).parents[1]
SCRIPTS = TESTS.parent / "training_scripts"
CONFIGS = TESTS / "configs"


@pytest.fixture
def run_killed(processes):
    """Trains as `killed_run` does; returns how many kills left a half-written checkpoint."""

    def run(folder, data, kills, mode):
        return int(processes.run([TESTS / "killed_run.py", folder, data, kills, mode]).split()[-1])

    return run


def read_ledger(folder):
    """Row of each image of the run; what a resumed run sees again must be what was seen before."""
    rows = {}
    for line in folder.with_suffix(".ledger").read_text().splitlines():
        first, ids = json.loads(line)
        for image, row in enumerate(ids, first):
            assert rows.setdefault(image, row) == row
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["indexed", "streaming"])
def test_twenty_kills(tmp_path, run_killed, parquet_folder, mode):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_killed(whole, parquet_folder, 0, mode)
    while_writing = run_killed(killed, parquet_folder, 20, mode)
    assert while_writing > 0  # of the kills, some hit a checkpoint that was being written
    assert_equal_checkpoints(*(run / "checkpoint-240" for run in (whole, killed)))
    assert read_log(whole) == read_log(killed)

    rows = read_ledger(killed)
    assert rows == read_ledger(whole)
    assert sorted(rows) == list(range(960))
    epochs = [{rows[image] for image in range(start, start + 32)} for start in range(0, 960, 32)]
    assert all(epoch == epochs[0] and len(epoch) == 32 for epoch in epochs)


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_text_to_image_on_damaged_shards(tmp_path, run_killed, damaged_webdataset, kills):
    """Files as those of CC12M, streamed: captions in their JSON, one row in twenty broken or without caption."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_killed(whole, damaged_webdataset, 0, "captions")
    run_killed(killed, damaged_webdataset, kills, "captions")
    assert_equal_checkpoints(*(run / "checkpoint-80" for run in (whole, killed)))
    assert read_log(whole) == read_log(killed)
    rows = read_ledger(killed)
    assert rows == read_ledger(whole) and sorted(rows) == list(range(320))
    reports = [json.loads((run / "damaged_rows.json").read_text()) for run in (whole, killed)]
    expected = {}
    for row, kind in sorted(damaged_rows()[1].items()):  # 70 rows of each of 4 files
        if kind != "bad_label":
            expected.setdefault(kind, []).append(10**9 * (row // 70) + row % 70)
    assert reports == [expected, expected]
    assert not set(rows.values()) & {row for kind in expected.values() for row in kind}


@pytest.fixture(scope="module")
def published(tmp_path_factory, processes, parquet_folder):
    """What the scripts start from: encoders, a tokenizer, pipelines, cached latents."""
    folder = tmp_path_factory.mktemp("published")
    tiny_encoder().save_pretrained(folder / "encoder")
    tiny_fae().save_pretrained(folder / "fae")
    tiny_rae().save_pretrained(folder / "rae")
    labels = {0: "circle", 1: "cross", 2: "heart", 3: "star"}
    pipeline = tiny_fae_dit_pipeline(transformer=tiny_lightning_dit(num_classes=4), id2label=labels)
    pipeline.save_pretrained(folder / "pipeline")
    tiny_fae_text_to_image_pipeline().save_pretrained(folder / "text-pipeline")
    save_sentence_encoder(folder / "text-encoder")
    flags = ["--vae", folder / "fae", "--dataset_name", parquet_folder, "--label_column", "kind"]
    flags += ["--caption_column", "kind", "--text_encoder", folder / "text-encoder", "--max_caption_length", "12"]
    config = CONFIGS / "smoke_cache_latents.yaml"
    processes.run([SCRIPTS / "cache_latents.py", *flags, "--output_dir", folder / "latents", "--config", config])
    return folder


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


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_script_killed_again_and_again(tmp_path, processes, published, parquet_folder, name):
    script, config, flags = RUNS[name]
    command = [SCRIPTS / script, "--config", CONFIGS / config, "--dataset_name", parquet_folder]
    command += ["--resume_from_checkpoint", "latest", "--report_to", "none"]
    command += [flag.format(published=published) for flag in flags]
    command += ["--max_train_steps", "6", "--checkpointing_steps", "2", "--validation_steps", "3"]
    command += ["--checkpoints_total_limit", "5"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    processes.run([*command, "--output_dir", whole])
    for checkpoint in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        child = processes.start([*command, "--output_dir", killed])
        while child.poll() is None and not (killed / checkpoint).exists():
            time.sleep(0.005)
        if child.poll() is None:
            child.kill()
            child.wait()
        assert (killed / checkpoint).is_dir()
    processes.run([*command, "--output_dir", killed])
    for step in (2, 4, 6):
        assert_equal_checkpoints(*(run / f"checkpoint-{step}" for run in (whole, killed)))
    assert read_log(whole) == read_log(killed)
    results = [sorted(path.relative_to(run) for path in run.rglob("*.safetensors")) for run in (whole, killed)]
    assert results[0] == results[1]
    for path in results[0]:
        assert read_tensors(whole / path) == read_tensors(killed / path), path


def read_tensors(path):
    """All that a safetensors file holds, to the bit; in which order its metadata are written is left to chance."""
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return file.metadata(), {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in tensors.items()}
