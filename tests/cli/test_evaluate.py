"""`hf-fae evaluate`: every task is found and lists its arguments."""

from importlib import import_module

import pytest
from evaluations import arguments, read_report

from hf_fae.cli import main
from hf_fae.cli.evaluate import TASKS


def fail(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", *map(str, argv)])
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_module_and_help(capsys, task):
    name, _ = TASKS[task]
    assert callable(getattr(import_module(f"hf_fae.evaluation.tasks.{name}"), f"evaluate_{task}"))
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", task, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: hf-fae evaluate {task}" in text and "--output_dir" in text
    assert ("--dataset_name" in text) == (task != "convergence")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_tasks_are_listed(capsys, argv):
    main(["evaluate", *argv])
    text = capsys.readouterr().out
    assert all(f"  {task} " in text for task in TASKS)


@pytest.mark.filterwarnings("ignore")
def test_a_table_is_printed_and_a_report_written(capsys, tmp_path, tokenizer_folder, data_folder):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {tokenizer_folder}\ndataset_name: {data_folder}\nmetrics: [psnr, ssim]\nmax_samples: 9\n"
    )
    main(["evaluate", "reconstruction", *arguments(config=config, output_dir=tmp_path / "out", max_samples=10)])
    lines = capsys.readouterr().out.splitlines()
    metrics = read_report(tmp_path / "out")["metrics"]
    protocol, *lines = lines
    assert protocol == f"protocol: {data_folder} validation; pictures 10 images"
    assert lines == [f"{name}  {metrics[name]:.6g}" for name in ("psnr", "ssim")] + [
        f"wrote {tmp_path}/out/report.json"
    ]
    assert read_report(tmp_path / "out")["settings"]["pictures"]["count"] == 10  # flags win


def test_errors_are_one_line(capsys, tmp_path, tokenizer_folder):
    tasks = "generation, reconstruction, probe, retrieval, matching, convergence, latents"
    assert fail(capsys, "images") == f"hf-fae: error: TASK must be one of {tasks}, got 'images'"
    options = arguments(model=tokenizer_folder, output_dir=tmp_path / "out", metrics="psnr")
    assert fail(capsys, "reconstruction", *options).startswith("hf-fae: error: dataset_name must name the images")
    assert "unknown arguments: --reference x.npz" in fail(capsys, "reconstruction", *options, "--reference", "x.npz")
    (tmp_path / "config.yaml").write_text("metrics: [")
    assert "the file must be YAML" in fail(capsys, "reconstruction", "--config", tmp_path / "config.yaml")
    assert "the following arguments are required" in fail(capsys, "probe")
    assert not (tmp_path / "out").exists()
