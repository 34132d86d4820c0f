"""How the tests start evaluations: as the command line does it."""

import json
import os
import subprocess
import sys

from hf_fae.cli.evaluate import evaluate


def arguments(**options) -> list[str]:
    """Flags of options; a list gives several values, None none at all."""
    argv = []
    for name, value in options.items():
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def run(task, **options):
    """The result of a task."""
    return evaluate(task, arguments(**options))


def run_in_two_processes(task, **options):
    """The same by what `accelerate launch` does on several devices; on a CPU alone it starts one process."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launch, "-m", "hf_fae.cli", "evaluate", task, *arguments(**options)]
    result = subprocess.run(command, env=env, timeout=300, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("wrote ") == 1  # by the main process: these were two that know of each other


def read_report(folder) -> dict:
    return json.loads((folder / "report.json").read_text())
