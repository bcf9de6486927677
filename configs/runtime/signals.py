"""The wish that a run stops soon, as signals bring it.

SIGTERM comes from ``scancel``, a node that drains, or ``accelerate launch`` when it is told to end;
SIGUSR1 is what sbatch scripts ask for some minutes before the time limit; SIGINT is Ctrl-C. They
set a flag that the loop reads between two optimiser steps; nothing is interrupted in the middle.
Who presses Ctrl-C again will not wait.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals that ask for a stop with the state saved."""


class StopRequest:
    """A flag that SIGTERM, SIGUSR1 and SIGINT set while the ``with`` block runs.

    The handlers that were there before come back with the end of the block. A signal that was
    ignored when the process started is heard as well: ``(trap '' USR1; exec accelerate launch …)``
    protects the launcher, and the ranks below it still listen.

    Raises:
        ValueError: entered outside the main thread; Python lets no other set handlers.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """True from the first signal on, also after the block."""
        return self._received is not None

    @property
    def reason(self) -> str:
        """Name of the first signal, e.g. ``SIGUSR1``; empty before it."""
        return "" if self._received is None else self._received.name

    @property
    def seconds(self) -> float:
        """Seconds since the first signal; 0 before it."""
        return 0.0 if self._received is None else time.monotonic() - self._since

    def __enter__(self) -> Self:
        """Listen from here on."""
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._before.items():
            # None: the handler came from C; Python can neither read nor restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # signal's form
        # Only the flag: logging or allocating much inside a handler may meet itself halfway.
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is None:
            self._since = time.monotonic()
            self._received = signal.Signals(number)
