"""The event loop that sends the requests of all object stores of this process.

Threads of obstore's runtime call into Python to deliver their results. One that does so while the
interpreter exits ends the process by SIGABRT, after its work is done. Before the exit, the loop is
therefore stopped, and these threads are waited for.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import threading
import time
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

    thread: threading.Thread = field(init=False)

    def start(self) -> _EventLoopThread:
        thread = threading.Thread(target=self.loop.run_forever, name="objects", daemon=True)
        object.__setattr__(self, "thread", thread)
        thread.start()
        return self

    def stop(self) -> None:
        """Cancel all requests and end the thread."""

        def end() -> None:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.call_soon(self.loop.stop)  # after the cancelled tasks

        self.loop.call_soon_threadsafe(end)
        self.thread.join(_EXIT_S)


_EXIT_S = 2.0
"""Longest wait at exit for the loop, and for the threads of obstore."""

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


@atexit.register
def _leave() -> None:
    """Stop the loop, and wait until no thread of obstore runs Python code."""
    global _thread
    if _thread is None or _thread.process != os.getpid():
        return
    _thread.stop()
    _thread = None  # a later request, by another exit handler, starts a new loop
    deadline = time.monotonic() + _EXIT_S
    time.sleep(0.01)  # releases the interpreter lock to threads that wait for it
    while _foreign_threads() and time.monotonic() < deadline:
        time.sleep(0.001)


def _foreign_threads() -> set[int]:
    """Return the threads that run Python code without having been started by Python."""
    return sys._current_frames().keys() - {thread.ident for thread in threading.enumerate()}


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
