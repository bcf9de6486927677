"""Stop requests by signal.

SIGTERM comes from ``scancel``, from a draining node, or from ``accelerate launch`` when it ends.
SIGUSR1 is what sbatch scripts request some minutes before the time limit, or SIGUSR2 where a site
uses SIGUSR1 itself. SIGINT is Ctrl-C. Each sets a flag that the loop checks between two optimiser
steps, so that no step is interrupted. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
"""Signals that request a stop with the state saved."""


class StopRequest:
    """A flag that SIGTERM, SIGUSR1, SIGUSR2 and SIGINT set while the ``with`` block runs.

    The previous handlers are restored at the end of the block. Signals that were ignored when the
    process started are handled too: ``(trap '' USR1; exec accelerate launch …)`` protects the
    launcher, and its ranks still receive SIGUSR1.

    Raises:
        ValueError: Entered outside the main thread, where Python allows no signal handlers.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._since = 0.0
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

    def __enter__(self) -> Self:
        """Install the handlers."""
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            # None: the handler was installed from C, and Python cannot restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # signal's form
        # Set the flag only: a handler can run in the middle of a logging call and must not log.
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is None:
            self._since = time.monotonic()
            self._received = signal.Signals(number)
