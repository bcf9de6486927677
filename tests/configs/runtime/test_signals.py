from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from configs.runtime.signals import STOP_SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def attached_terminal() -> Iterator[None]:
    """The tests may run under nohup, which ignores SIGHUP in all its children."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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


BLOCKED = """
import ctypes
from configs.runtime.logs import start_logging
from configs.runtime.signals import StopRequest

start_logging()
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_init(mutex, None)
libc.pthread_mutex_lock(mutex)
with StopRequest() as stop:
    stop.before_exit = lambda: print("recorded", flush=True)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
"""
"""The main thread waits in C code, as in a collective, where Python runs no signal handler."""


@pytest.mark.slow
def test_ctrl_c_is_answered_at_once_and_the_second_one_ends_a_main_thread_that_waits_in_c() -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", BLOCKED]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert "stopping at the next safe point" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "recorded\n"
        assert process.wait(timeout=60) == 130


WAITING = """
import ctypes
from configs.runtime import signals

signals._WAIT_S = 0.3
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_init(mutex, None)
libc.pthread_mutex_lock(mutex)
with signals.StopRequest() as stop:
    with stop.ending_a_wait(lambda message: print("a wait that has ended", flush=True)):
        pass
    with stop.ending_a_wait(lambda message: print(message, flush=True)):
        print("ready", flush=True)
        libc.pthread_mutex_lock(mutex)
"""
"""The main thread waits in C code, as for a host that does not resolve."""


def test_a_signal_ends_a_rank_that_waits_for_others_in_c_and_has_nothing_to_save() -> None:
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == (
            "SIGTERM: stopped while waiting for the other ranks; rerun the command to resume\n"
        )
        assert process.wait(timeout=60) == 75


def test_a_signal_to_a_forked_child_is_not_one_to_its_parent() -> None:
    with StopRequest() as stop:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(0)
        os.waitpid(child, 0)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGTERM"


@pytest.mark.parametrize(("start", "reason"), [("exec", "SIGHUP"), ("trap '' HUP; exec", "")])
def test_a_closed_terminal_requests_a_stop_unless_nohup_ignores_it(start: str, reason: str) -> None:
    script = (
        "import os, signal\n"
        "from configs.runtime.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(stop.reason)\n"
    )
    command = ["bash", "-c", f'{start} "$0" -c "$1"', sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{reason}\n"


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
