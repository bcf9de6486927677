"""Stop requests by signal.

SIGTERM comes from ``scancel``, from a draining node, or from ``accelerate launch`` when it ends.
SIGUSR1 is what sbatch scripts request some minutes before the time limit, or SIGUSR2 where a site
uses SIGUSR1 itself. SIGHUP comes from a terminal that closes. SIGINT is Ctrl-C. Each sets a flag
that the loop checks between two optimiser steps, so that no step is interrupted. A second Ctrl-C
stops at once.

Python runs signal handlers in the main thread, between two instructions. A main thread that waits
in C code, for example for another rank, runs none. The first answer and the last resort therefore
belong to a thread, which the C part of Python's signal handling wakes up.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

from configs.errors import Interrupted

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
"""Signals that request a stop with the state saved."""

_UNWIND_S = 5.0
"""Time after the second Ctrl-C in which the main thread may end the block by itself."""

_WAIT_S = 5.0
"""Time after a signal in which a wait for other ranks may end by itself."""

_KILLED_BY_CTRL_C = 128 + signal.SIGINT


class StopRequest:
    """A flag that the signals of ``STOP_SIGNALS`` set while the ``with`` block runs.

    The previous handlers are restored at the end of the block. Signals that were ignored when the
    process started are handled too: ``(trap '' USR1; exec accelerate launch …)`` protects the
    launcher, and its ranks still receive SIGUSR1. Only an ignored SIGHUP stays ignored: ``nohup``.

    Attributes:
        before_exit: Called before the process is ended because it did not react to a second Ctrl-C.

    Raises:
        ValueError: Entered outside the main thread, where Python allows no signal handlers.
    """

    def __init__(self) -> None:
        self.before_exit: Callable[[], None] = lambda: None
        self._received: signal.Signals | None = None
        self._since = 0.0
        self._ended = threading.Event()
        self._interrupts = 0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived; also valid after the block."""
        return self._received is not None

    @property
    def reason(self) -> str:
        """Name of the first signal, e.g. ``SIGUSR1``; empty before it."""
        return "" if self._received is None else self._received.name

    @property
    def seconds(self) -> float:
        """Seconds since the first signal; 0 before it."""
        return 0.0 if self._received is None else time.monotonic() - self._since

    @contextmanager
    def ending_a_wait(self, record: Callable[[str], None]) -> Iterator[None]:
        """End the process if a signal has arrived and the block does not end within 5 s.

        For a wait without anything to save, in C code where no signal handler runs. The ranks of a
        healthy world meet in that time and stop together, at the same step.

        Args:
            record: Called with the message before the process ends with exit code 75.
        """
        ended = threading.Event()
        began = time.monotonic()

        def watch() -> None:
            while not ended.wait(0.2):
                if min(self.seconds, time.monotonic() - began) > _WAIT_S:
                    message = (
                        f"{self.reason}: stopped while waiting for the other ranks; rerun the "
                        "command to resume"
                    )
                    logger.error("%s", message)
                    record(message)
                    os._exit(Interrupted.exit_code)

        threading.Thread(target=watch, name="wait", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def __enter__(self) -> Self:
        """Install the handlers and start the thread."""
        kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        handled = [number for number in STOP_SIGNALS if number not in kept]
        self._before = {number: signal.signal(number, self._note) for number in handled}
        inbox, self._outbox = socket.socketpair()
        self._outbox.settimeout(0)
        self._wakeup = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._ended.clear()
        threading.Thread(target=self._answer, args=(inbox,), name="stop", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the previous handlers, and end the thread."""
        self._ended.set()
        signal.set_wakeup_fd(self._wakeup)
        self._outbox.close()
        for number, handler in self._before.items():
            # None: the handler was installed from C, and Python cannot restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # signal's form
        # Set the flag only: a handler can run in the middle of a logging call and must not log.
        if number == signal.SIGINT and self._interrupts:
            raise KeyboardInterrupt
        self._interrupts += number == signal.SIGINT
        self._set(signal.Signals(number))

    def _set(self, number: signal.Signals) -> None:
        if self._received is None:
            self._since = time.monotonic()
            self._received = number

    def _answer(self, inbox: socket.socket) -> None:
        """Answer the first signal at once; end a process that does not react to two Ctrl-C."""
        interrupts, answered = 0, False
        with inbox:
            while numbers := inbox.recv(64):
                for number in filter(self._before.__contains__, numbers):
                    self._set(signal.Signals(number))  # also where no handler can run
                    interrupts += number == signal.SIGINT
                    if not answered:
                        logger.warning("%s", _answer_to(signal.Signals(number)))
                        answered = True
                if interrupts > 1 and not self._ended.wait(_UNWIND_S):
                    self.before_exit()
                    os._exit(_KILLED_BY_CTRL_C)


def _answer_to(number: signal.Signals) -> str:
    if number == signal.SIGINT:
        return "stopping at the next safe point, up to 20 s; press Ctrl-C again to stop now"
    return f"{number.name}: stopping at the next safe point"


def _leave_parent() -> None:
    """A forked child must not write its signals to the thread of its parent."""
    with suppress(ValueError):  # forked by another thread
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_parent)
