from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from configs.runtime.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_requests_a_stop_and_is_its_reason(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert (stop.requested, stop.reason) == (False, "")
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.reason) == (True, number.name)
    assert stop.requested


def test_the_first_signal_is_the_reason() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGUSR1"


def test_a_second_ctrl_c_stops_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_previous_handlers_are_restored_even_after_an_error() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(RuntimeError, match="in the block"), StopRequest():
        raise RuntimeError("in the block")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_signal_ignored_at_the_start_is_handled_in_the_block_and_ignored_again_after_it() -> None:
    script = (
        "import os, signal\n"
        "from configs.runtime.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "assert stop.reason == 'SIGUSR1'\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "print('alive')\n"
    )
    command = 'trap \'\' USR1; exec "$0" -c "$1"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "alive\n"
