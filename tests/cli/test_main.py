"""`hf-fae`: the commands are listed, and each is imported when it runs."""

import subprocess
import sys

import pytest
from command_line import fail

from hf_fae.cli import COMMANDS, main


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert {line.split()[0] for line in text.splitlines() if line.startswith("    ")} >= set(COMMANDS)


def test_help_imports_no_command():
    code = "import sys; from hf_fae.cli import COMMANDS, main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not any(f'hf_fae.cli.{name}' in sys.modules for name in COMMANDS)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_unknown_commands_are_refused(capsys):
    assert "invalid choice: 'paint'" in fail(capsys, "paint")
    assert "COMMAND" in fail(capsys)
