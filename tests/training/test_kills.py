"""SIGKILL at random moments: nothing is lost, and no image is skipped or seen twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import assert_equal_checkpoints, read_log


TESTS = Path(__file__).parents[1]


def run_killed(folder, data, kills, mode):
    command = [sys.executable, str(TESTS / "killed_run.py"), str(folder), str(data), str(kills), mode]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder.with_suffix(".cache"))}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return int(result.stdout.split()[-1])


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
def test_twenty_kills(tmp_path, parquet_folder, mode):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_killed(whole, parquet_folder, 0, mode)
    while_writing = run_killed(killed, parquet_folder, 20, mode)
    print(f"{while_writing} of 20 kills hit a checkpoint that was being written")
    assert_equal_checkpoints(*(run / "checkpoint-200" for run in (whole, killed)))
    assert read_log(whole) == read_log(killed)

    rows = read_ledger(killed)
    assert rows == read_ledger(whole)
    assert sorted(rows) == list(range(800))
    epochs = [{rows[image] for image in range(start, start + 32)} for start in range(0, 800, 32)]
    assert all(epoch == epochs[0] and len(epoch) == 32 for epoch in epochs)
