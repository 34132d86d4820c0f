"""How the tests start evaluations: as the command line does it."""

import json

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


def run_in_two_processes(processes, task, **options):
    """The same in two processes, as `accelerate launch` starts them on two devices."""
    printed = processes.run_in_two_processes(["-m", "hf_fae.cli", "evaluate", task, *arguments(**options)])
    assert printed.count("wrote ") == 1  # by the main process: these were two that know of each other


def read_report(folder) -> dict:
    return json.loads((folder / "report.json").read_text())
