"""Signals by which schedulers and users end a run: the work in progress is saved first.

SLURM, Kubernetes and others send SIGTERM some time before SIGKILL, SLURM's `--signal` also SIGUSR1, and Ctrl-C sends
SIGINT. The exit code is 128 plus the signal's number, as shells and schedulers expect.
"""

import os
import signal
import threading
import time
from datetime import timedelta

import torch
from torch import distributed


__all__ = ["StopSignals", "ignore_signals"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# `torchrun` passes on to its processes what a scheduler or a terminal has already sent to all of them.
ECHO_SECONDS = 3.0

# How long one process waits for the others to finish their unit of work.
PATIENCE = timedelta(hours=6)


class StopSignals:
    """Within this context the first of `SIGNALS` is noted, and a second one ends the process at once.

    The processes of a run agree: all of them stop when one has received a signal. They vote on the CPU, so that the
    host does not wait for the device.

    Args:
        unit: what is still finished, for the notice on standard error.
        announce: whether this process writes that notice.
        patience: how long this process waits for the vote of the others.

    Attributes:
        received: number of the signal that this process has received; 0 if there was none.
    """

    def __init__(self, unit: str, announce: bool = True, patience: timedelta = PATIENCE):
        self.unit, self.announce, self.received = unit, announce, 0
        self._previous, self._when = {}, 0.0
        several = distributed.is_initialized() and distributed.get_world_size() > 1
        self._group = distributed.new_group(backend="gloo", timeout=patience) if several else None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def vote(self) -> int:
        """The largest of the signals that the processes have received, 0 if none has; every process must call it."""
        if self._group is None:
            return self.received
        vote = torch.tensor(self.received)
        distributed.all_reduce(vote, distributed.ReduceOp.MAX, group=self._group)
        return int(vote)

    def check(self) -> None:
        """Exit if a process has received a signal: to be called by every process, where everything is saved.

        Raises:
            SystemExit: with the code 128 plus the signal's number.
        """
        if received := self.vote():
            raise SystemExit(128 + received)

    def _note(self, number, frame):
        now = time.monotonic()
        if self.received and (number != self.received or now > self._when + ECHO_SECONDS):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.received:
            return
        self.received, self._when = number, now
        if self.announce:  # `print` is not safe in a signal handler
            name = signal.Signals(number).name
            notice = f"{name}: {self.unit} is finished and saved; one more after {ECHO_SECONDS:.0f} s ends at once"
            os.write(2, f"\n{notice}\n".encode())


def ignore_signals(worker: int | None = None) -> None:
    """Leave the signals, which may be sent to all processes of a job, to the parent that a data worker serves."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
