"""SIGKILL at random moments: the report is the same to the last digit."""

from pathlib import Path

import pytest
from evaluations import arguments, read_report


TESTS = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["generation", "reconstruction"])
def test_ten_kills(tmp_path, processes, pipeline_folder, tokenizer_folder, judge_folder, data_folder, task):
    options = {"extractors": [f"effnet={judge_folder}"], "dataset_name": data_folder, "batch_size": 1}
    if task == "generation":
        options |= {"model": pipeline_folder, "num_samples": 1000}
    else:
        options |= {"model": tokenizer_folder, "split": "+".join(8 * ["train"]), "metrics": ["rfid", "psnr", "ssim"]}
    for kills, name in ((0, "whole"), (10, "killed")):
        flags = arguments(output_dir=tmp_path / name, **options)
        processes.run([TESTS / "killed_evaluation.py", kills, task, *flags])
    assert (tmp_path / "killed" / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()
    assert len(read_report(tmp_path / "whole")["metrics"]) >= 3
