"""How tests call commands that must fail."""

import pytest

from hf_fae.cli import main


def fail(capsys, *argv) -> str:
    """The one line on standard error of a command that must fail."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in argv])
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    # Progress bars of what was loaded before go to standard error as well.
    line = captured.err.splitlines()[-1]
    assert line.startswith("hf-fae") and ": error: " in line
    return line
