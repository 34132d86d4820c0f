import os
import signal

import pytest
import torch

from hf_fae.evaluation.options import CHUNK
from hf_fae.evaluation.resumable import Parts, check_settings


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def squares(numbers):
    return {"square": torch.tensor([[number**2] for number in numbers])}


def test_parts_hold_a_row_for_each_image_in_order(tmp_path):
    parts = Parts(tmp_path, count=100, batch_size=CHUNK)
    parts.compute(squares, "squares")
    assert parts.names() == ["square"]
    assert [len(part) for part in parts.iterate("square")] == [32, 32, 32, 4]
    assert parts.stack("square").flatten().tolist() == [number**2 for number in range(100)]


@pytest.mark.parametrize(("batch_size", "part_size"), [(1, 32), (32, 32), (33, 64), (256, 256)])
def test_parts_begin_where_chunks_begin(tmp_path, batch_size, part_size):
    assert Parts(tmp_path, 100, batch_size).part_size == part_size


def test_what_is_there_is_not_computed_again(tmp_path):
    seen = []

    def make_part(numbers):
        if len(seen) == 2:
            raise Stopped
        seen.append(numbers)
        return squares(numbers)

    parts = Parts(tmp_path, 100, 1)
    with pytest.raises(Stopped):
        parts.compute(make_part, "squares")
    (tmp_path / "000000064.part").write_bytes(b"half of a part")
    again = []
    parts.compute(lambda numbers: again.append(numbers) or squares(numbers), "squares")
    assert (seen, again) == ([range(0, 32), range(32, 64)], [range(64, 96), range(96, 100)])
    assert parts.stack("square").flatten().tolist() == [number**2 for number in range(100)]


def test_settings_must_be_those_of_the_run_that_goes_on(tmp_path):
    folder = tmp_path / "new" / "run"
    check_settings(folder, {"seed": 0, "scale": [(0.0, 1.0)]})
    check_settings(folder, {"seed": 0, "scale": [(0.0, 1.0)]})
    with pytest.raises(ValueError, match="another seed, 0, got 1"):
        check_settings(folder, {"seed": 1, "scale": [(0.0, 1.0)]})
    with pytest.raises(ValueError, match="another steps, None, got 3"):
        check_settings(folder, {"seed": 0, "scale": [(0.0, 1.0)], "steps": 3})


def test_where_things_lie_does_not_count(tmp_path):
    folder = tmp_path / "run"
    check_settings(folder, {"model": {"path": "here", "sha256": "a"}})
    check_settings(folder, {"model": {"path": "there", "sha256": "a"}})
    with pytest.raises(ValueError, match="another model"):
        check_settings(folder, {"model": {"path": "there", "sha256": "b"}})


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"output_dir '{folder}' cannot be"):
            check_settings(folder, {"seed": 0})


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=f"output_dir must be new, empty or that of an evaluation, got '{tmp_path}'"):
        check_settings(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_kill_while_the_settings_are_written_is_no_hindrance(tmp_path):
    (tmp_path / "settings.part").write_text('{"se')
    check_settings(tmp_path, {"seed": 0})
    assert (tmp_path / "settings.json").is_file()


SIGNALLED = """
import os, signal, sys, torch
from hf_fae.evaluation.resumable import Parts

def make_part(numbers):
    if numbers.start == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGTERM)
    return {"square": torch.tensor([[number**2] for number in numbers])}

Parts(sys.argv[1], 160, 1).compute(make_part, "squares")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_ends_it_after_the_part(tmp_path, number):
    def make_part(numbers):
        if numbers.start == 32:
            os.kill(os.getpid(), number)
        return squares(numbers)

    with pytest.raises(SystemExit) as ended:
        Parts(tmp_path, 100, 1).compute(make_part, "squares")
    assert ended.value.code == 128 + number
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [f"{n:09d}.safetensors" for n in (0, 32)]


@pytest.mark.parametrize(("signalled", "kept"), [(32, 2), (128, 5)], ids=["in the middle", "in the last round"])
def test_all_processes_stop_for_the_signal_of_one(tmp_path, processes, signalled, kept):
    """Five parts on two processes: the second one has none in the last round."""
    for process in processes.start_two_processes(["-c", SIGNALLED, tmp_path, signalled]):
        assert process.wait() == 128 + signal.SIGTERM, process.stderr[-3000:]
        assert "Traceback" not in process.stderr
    assert len(list(tmp_path.glob("*.safetensors"))) == kept
    processes.run_in_two_processes(["-c", SIGNALLED, tmp_path, -1])
    assert Parts(tmp_path, 160, 1).stack("square").flatten().tolist() == [number**2 for number in range(160)]
