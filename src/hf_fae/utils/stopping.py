"""Signals by which schedulers and users end a run: the work in progress is saved first.

SLURM, Kubernetes and others send SIGTERM some time before SIGKILL, SLURM's `--signal` also SIGUSR1, and Ctrl-C sends
SIGINT. The exit code is 128 plus the signal's number, as shells and schedulers expect.
"""

import os
import signal
import threading


__all__ = ["StopSignals", "ignore_signals"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Within this context the first of `SIGNALS` is noted, and a second one ends the process at once.

    Args:
        unit: what is still finished, for the notice on standard error.
        announce: whether this process writes that notice.

    Attributes:
        received: number of the signal; 0 if there was none.
    """

    def __init__(self, unit: str, announce: bool = True):
        self.unit, self.announce, self.received = unit, announce, 0
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Exit if a signal was received; to be called where everything is saved.

        Raises:
            SystemExit: with the code 128 plus the signal's number.
        """
        if self.received:
            raise SystemExit(128 + self.received)

    def _note(self, number, frame):
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        if self.announce:  # `print` is not safe in a signal handler
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: {self.unit} is finished and saved; a second signal ends at once\n".encode())


def ignore_signals(worker: int | None = None) -> None:
    """Leave the signals, which may be sent to all processes of a job, to the parent that a data worker serves."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
