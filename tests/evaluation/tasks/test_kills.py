"""SIGKILL at random moments: the report is the same to the last digit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluations import arguments, read_report


TESTS = Path(__file__).parents[2]


def run_killed(kills, task, tmp_path, **options):
    command = [sys.executable, TESTS / "killed_evaluation.py", str(kills), task, *arguments(**options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["generation", "reconstruction"])
def test_ten_kills(tmp_path, pipeline_folder, tokenizer_folder, judge_folder, data_folder, task):
    options = {"extractors": [f"effnet={judge_folder}"], "dataset_name": data_folder, "batch_size": 1}
    if task == "generation":
        options |= {"model": pipeline_folder, "num_samples": 1000}
    else:
        options |= {"model": tokenizer_folder, "split": "+".join(8 * ["train"]), "metrics": ["rfid", "psnr", "ssim"]}
    run_killed(0, task, tmp_path, output_dir=tmp_path / "whole", **options)
    run_killed(10, task, tmp_path, output_dir=tmp_path / "killed", **options)
    assert (tmp_path / "killed" / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()
    assert len(read_report(tmp_path / "whole")["metrics"]) >= 3
