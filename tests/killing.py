"""Run something in a child process and kill it, again and again, until it gets through."""

import os
import signal
import time
from collections.abc import Callable

from fork_server import PATIENCE


def kill_repeatedly(
    kills: int, run: Callable[[], None], wait: Callable[[int], None], is_writing: Callable[[], bool]
) -> int:
    """SIGKILL `kills` times, then let it finish; the children are forked, so that a kill costs a fraction of a second.

    Args:
        run: what a child does.
        wait: returns when the child of this number is to be killed.
        is_writing: whether a file was left half-written.

    Returns:
        How many kills left a half-written file.
    """
    while_writing = 0
    for number in range(kills + 1):
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
                run()
                os._exit(0)
        is_last = number == kills
        if not is_last:
            wait(number)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not is_last and os.WIFEXITED(status):
            raise SystemExit(f"it ended with status {status} before it could be killed: give it more to do")
        if is_last and status:
            raise SystemExit(f"it failed with status {status}")
        while_writing += not is_last and is_writing()
    return while_writing


def wait_until(condition: Callable[[], bool]) -> None:
    """For a third of `PATIENCE` at most, so that whoever waits for this process sees how it ended."""
    deadline = time.monotonic() + PATIENCE / 3
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
