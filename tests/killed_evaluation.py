"""Evaluate in a child process and kill it, again and again, until it gets through. Run by test_kills.py.

    python killed_evaluation.py KILLS TASK ARGUMENTS ...

The children are forked after all imports, so that a kill costs a fraction of a second.
"""

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from hf_fae.evaluation.commands import evaluate


def count_files(folder):
    """Parts and the report, also those that are being written."""
    return sum(1 for path in folder.rglob("*") if path.is_file())


def main(kills, task, argv):
    """Kill `kills` times at random moments, then let it finish. Prints how often the kill hit a half-written file."""
    folder, chance = Path(argv[argv.index("--output_dir") + 1]), random.Random(0)
    while_writing = done = 0
    while done <= kills:
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
                evaluate(task, argv)
                os._exit(0)
        if done < kills:
            files, deadline = count_files(folder) + chance.randint(0, 2), time.monotonic() + 60
            while count_files(folder) < files and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if done < kills and os.WIFEXITED(status):
            raise SystemExit(f"the evaluation ended with {status} before it could be killed: give it more to do")
        if status and done == kills:
            raise SystemExit(f"the evaluation failed with status {status}")
        while_writing += done < kills and any(folder.rglob("*.part"))
        done += 1
    print(while_writing)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
