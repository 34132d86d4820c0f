import pytest

from hf_fae.utils.command_line import run


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("steps must be positive,\n got 0"), "error: steps must be positive, got 0"),
        (
            OSError("x is not a local folder.\nIf this is a private repository, log in."),
            "error: x is not a local folder.",
        ),
        (ImportError("plots require matplotlib"), "error: plots require matplotlib"),
        (MemoryError(), "error: not enough memory: MemoryError"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "error: not enough memory: CUDA out of memory."),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), "error: 'a.yaml': No such file or directory"),
    ],
)
def test_user_errors_are_one_sentence(monkeypatch, capsys, error, sentence):
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit) as ended:
        run(failing(error))
    assert ended.value.code == 2 and capsys.readouterr().err == f"train.py: {sentence}\n"


def test_tracebacks_on_request_and_for_programming_errors(monkeypatch):
    with pytest.raises(TypeError):
        run(failing(TypeError("bug")))
    with pytest.raises(RuntimeError):
        run(failing(RuntimeError("shapes do not match")))
    monkeypatch.setenv("HF_FAE_TRACEBACK", "1")
    with pytest.raises(ValueError):
        run(failing(ValueError("x")))


def test_ctrl_c_exits_with_its_code(capsys):
    with pytest.raises(SystemExit) as ended:
        run(failing(KeyboardInterrupt()))
    assert ended.value.code == 130 and "interrupted" in capsys.readouterr().err
