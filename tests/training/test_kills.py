"""SIGKILL at random moments: nothing is lost, and no image is skipped or seen twice."""

import json
import time
from pathlib import Path

import pytest
from damaged import damaged_rows
from reliability.kills import CASES, CONFIGS, RUNS, SCRIPTS, publish_models, read_tensors
from training_runs import assert_equal_checkpoints, read_log


TESTS = Path(__file__).parents[1]


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
    publish_models(folder, parquet_folder)
    return folder


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.startswith("generator-latents")], ids=lambda case: case.name
)
def test_signals(tmp_path, case):
    case.run(tmp_path)
