"""The event loop that sends the requests of all object stores of this process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from configs.errors import MachineError

T = TypeVar("T")


@dataclass(frozen=True)
class _EventLoopThread:
    """An event loop in a daemon thread, and the process that started it."""

    process: int = field(default_factory=os.getpid)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def start(self) -> _EventLoopThread:
        threading.Thread(target=self.loop.run_forever, name="objects", daemon=True).start()
        return self


_thread: _EventLoopThread | None = None
_lock = threading.Lock()


def event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of this process; start it on first use.

    Raises:
        MachineError: this process was forked from one that had started the loop.
    """
    global _thread
    if _thread is not None and _thread.process != os.getpid():
        raise MachineError(
            f"object store: used in process {os.getpid()}, which was forked from {_thread.process} "
            "after that had used one: connections do not survive a fork; start workers by spawn "
            "(multiprocessing.get_context('spawn')), or use none"
        )
    with _lock:
        if _thread is None:
            _thread = _EventLoopThread().start()
        return _thread.loop


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the event loop; block this thread until it returns.

    Raises:
        MachineError: this is a forked process.
    """
    try:
        loop = event_loop()
    except MachineError:
        coroutine.close()
        raise
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
