import os
import signal
import subprocess
import sys
import time

import pytest
from training_runs import Vectors, arguments, checkpoints, read_log, run

from hf_fae.training.loop import TrainingLoop
from hf_fae.training.processes import make_accelerator


@pytest.mark.parametrize(
    ("name", "value", "argument"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "many", "the environment"),
    ],
)
def test_what_accelerate_launch_says_must_agree(monkeypatch, fresh_accelerate, name, value, argument):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"(?i)^{argument} .*{value}"):
        make_accelerator("no")


def test_the_default_of_accelerate_launch_is_no_wish(monkeypatch, fresh_accelerate):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    accelerator = make_accelerator("bf16", 2)
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("bf16", 2)


class Signalled(Vectors):
    """Sends a signal to this process before the batch of an image number."""

    def __init__(self, number, first_image):
        super().__init__()
        self.number, self.first_image = number, first_image

    def batches(self, batch_size, **position):
        for start, batch in enumerate(super().batches(batch_size, **position)):
            if start * batch_size == self.first_image:
                os.kill(os.getpid(), self.number)
            yield batch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_its_step(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, Signalled(number, 16))  # the fifth step, between checkpoints, log lines and validations
    assert ended.value.code == 128 + number
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    assert [line["step"] for line in read_log(tmp_path)] == [3, 4]
    assert signal.getsignal(number) == before


def test_two_runs_in_one_folder(tmp_path):
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
from hf_fae.utils.locks import lock_folder
lock = lock_folder({str(tmp_path)!r}); print("locked", flush=True); sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=f"^output_dir '{tmp_path}' is in use by another run"):
        TrainingLoop(arguments(tmp_path))
    other.kill()
    other.wait()
    run(tmp_path, max_train_steps=2)


def test_fewer_steps_than_the_checkpoint_has(tmp_path):
    run(tmp_path, max_train_steps=4)
    with pytest.raises(ValueError, match="^max_train_steps must be at least 4 to resume from .*checkpoint-4', got 2"):
        run(tmp_path, max_train_steps=2, resume_from_checkpoint="latest")
    assert checkpoints(tmp_path) == ["checkpoint-4"]


def test_processes_stop_in_the_same_step_and_hangs_are_named(tmp_path):
    """One of two processes gets a signal: both stop. One of two stops to answer: the other says so."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, signal, sys; sys.path[:0] = {sys.path!r}
from test_processes import Signalled
from training_runs import ImageNoise, run
is_first = os.environ["RANK"] == "0"
number = int(sys.argv[2])
run(sys.argv[1], Signalled(number, 12 if not is_first else 10**9), ImageNoise(), process_timeout=5)
""")
    sys.path.insert(0, os.path.dirname(__file__))
    for number, code in ((signal.SIGUSR1, 128 + signal.SIGUSR1), (signal.SIGSTOP, 1)):
        folder, ranks = tmp_path / str(number), []
        for rank in ("0", "1"):
            env = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            env |= {"MASTER_PORT": str(29600 + os.getpid() % 1000 + number), "ACCELERATE_USE_CPU": "true"}
            env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
            command = [sys.executable, str(script), str(folder), str(int(number))]
            ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        try:
            _, text = ranks[0].communicate(timeout=120)
            assert ranks[0].returncode == code, text[-3000:]
            if number == signal.SIGUSR1:
                assert ranks[1].wait(60) == code and "checkpoint-4" in checkpoints(folder)
            else:
                assert "TimeoutError: process 0 of 2 waited 0:00:05 for another one" in text, text[-3000:]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        time.sleep(0.1)
