import os
import signal
import time

import pytest

from hf_fae.utils import stopping
from hf_fae.utils.stopping import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_is_noted_and_told_and_the_exit_code_says_it(number, capfd):
    with StopSignals("the part") as signals:
        signals.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # torchrun passes on what its processes have received as well
        with pytest.raises(SystemExit) as ended:
            signals.check()
    assert ended.value.code == 128 + number
    assert capfd.readouterr().err.count(f"{number.name}: the part is finished and saved") == 1


@pytest.mark.parametrize("second", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_second_signal_ends_at_once(second, monkeypatch):
    """The same one after the time of an echo, or another one."""
    monkeypatch.setattr(stopping, "ECHO_SECONDS", 0.01)
    child = os.fork()
    if child == 0:
        with StopSignals("the part", announce=False):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            os.kill(os.getpid(), second)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -second
