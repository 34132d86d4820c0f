"""`hf-fae completion`: bash completes what the script lists."""

import subprocess

import pytest
from command_line import fail

from hf_fae.cli import COMMANDS, main


def complete(script, *words):
    words = ["hf-fae", *words]
    code = (
        f"{script}\nCOMP_WORDS=({' '.join(words)} '')\nCOMP_CWORD={len(words)}\n_shtab_hf_fae\necho ${{COMPREPLY[@]}}"
    )
    return subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_bash_completes(capsys, tmp_path):
    pytest.importorskip("shtab")
    main(["completion", "bash"])
    script = capsys.readouterr().out
    assert set(complete(script)) >= set(COMMANDS)
    assert "reconstruction" in complete(script, "evaluate")
    assert complete(script, "generate", "--dtype") == ["float32", "bfloat16", "float16"]


def test_shells_are_named(capsys):
    assert "invalid choice: 'fish'" in fail(capsys, "completion", "fish")
