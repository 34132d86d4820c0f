"""Evaluate in a child process and kill it, again and again, until it gets through. Run by tasks/test_kills.py.

python killed_evaluation.py KILLS TASK ARGUMENTS ...
"""

import random
import sys
import time
import warnings
from pathlib import Path

import torch
from killing import kill_repeatedly, wait_until

from hf_fae.cli.evaluate import evaluate


def count_files(folder):
    """Parts and the report, also those that are being written."""
    return sum(1 for path in folder.rglob("*") if path.is_file())


def main(kills, task, argv):
    """Kill at random moments; prints how often that left a half-written file."""
    folder, chance = Path(argv[argv.index("--output_dir") + 1]), random.Random(0)

    def wait(number):
        files = count_files(folder) + chance.randint(0, 2)
        wait_until(lambda: count_files(folder) >= files)
        time.sleep(chance.uniform(0, 0.3))

    print(kill_repeatedly(kills, lambda: evaluate(task, argv), wait, lambda: any(folder.rglob("*.part"))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
