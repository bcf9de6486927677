"""Numbered tasks, run in this process or in several worker processes.

Workers are spawned, not forked, so they inherit no thread and no lock. A worker shares only a pipe
with its parent: killing one cannot block another. A worker is killed with its parent, so no orphan
publishes files next to a rerun.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

from configs.errors import MachineError, MovieNetError
from configs.runtime.hints import remember_arguments, remembered_arguments
from configs.runtime.signals import STOP_SIGNALS

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

ProgressUpdate = Mapping[str, int]
"""Counts since the last update, e.g. ``{"images": 4400}``."""

OnProgress = Callable[[ProgressUpdate], None]

_EXIT_TIMEOUT_S = 10.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Task(Protocol[R_co]):
    """Work to do for one number; it is pickled if there are workers."""

    def __call__(self, number: int, on_progress: OnProgress) -> R_co:
        """Do the work for ``number`` and report progress to ``on_progress``."""


def run_tasks(
    task: Task[R],
    numbers: Sequence[int],
    *,
    workers: int = 1,
    on_progress: OnProgress = lambda _: None,
) -> list[R]:
    """Run a task for each number; return the results in order.

    Args:
        task: The work.
        numbers: In this order; an idle worker takes the next one.
        workers: Number of processes; with one, all work runs in this process.
        on_progress: Called in this process with each progress update of a task.

    Raises:
        MachineError: a worker was killed.
        Exception: the first error of a task; the other workers stop at their next update.
    """
    if min(workers, len(numbers)) < 2:
        return [task(number, on_progress) for number in numbers]
    with _WorkerPool(task, numbers, workers, on_progress) as pool:
        results = pool.run()
    return [results[number] for number in numbers]


@dataclass(frozen=True)
class _Updated:
    update: ProgressUpdate


@dataclass(frozen=True)
class _Done:
    result: Any


@dataclass(frozen=True)
class _Failed:
    error: Exception


@dataclass
class _Worker:
    process: BaseProcess
    number: int


class _WorkerPool(Generic[R]):
    """Worker processes, each with its pipe."""

    def __init__(
        self, task: Task[R], numbers: Sequence[int], workers: int, on_progress: OnProgress
    ) -> None:
        self._task, self._on_progress = task, on_progress
        self._waiting = deque(numbers)
        self._results: dict[int, R] = {}
        self._workers: dict[Connection[Any, Any], _Worker] = {}
        self._count = min(workers, len(numbers))

    def __enter__(self) -> _WorkerPool[R]:
        return self

    def __exit__(self, *_: object) -> None:
        # A busy worker finds its pipe closed at its next update, cleans up and exits.
        for pipe in self._workers:
            pipe.close()
        for worker in self._workers.values():
            worker.process.join(_EXIT_TIMEOUT_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def run(self) -> dict[int, R]:
        """Start the workers, distribute all numbers, return the results."""
        context = multiprocessing.get_context("spawn")
        arguments = remembered_arguments()
        for _ in range(self._count):
            pipe, worker_pipe = context.Pipe()
            process = context.Process(
                target=_serve, args=(worker_pipe, self._task, os.getpid(), arguments)
            )
            process.start()
            # Only the worker keeps its end, so that its death closes the pipe.
            worker_pipe.close()
            self._workers[pipe] = _Worker(process, self._waiting[0])
            self._assign_next(pipe)
        while self._workers:
            for ready in wait(list(self._workers)):
                if isinstance(ready, Connection):
                    self._receive(ready)
        return self._results

    def _receive(self, pipe: Connection[Any, Any]) -> None:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            raise self._killed(pipe) from None
        if isinstance(message, _Updated):
            self._on_progress(message.update)
        elif isinstance(message, _Failed):
            raise message.error
        else:
            self._results[self._workers[pipe].number] = message.result
            self._assign_next(pipe)

    def _assign_next(self, pipe: Connection[Any, Any]) -> None:
        """Send a worker its next number; stop the worker if none is left."""
        worker = self._workers[pipe]
        if self._waiting:
            worker.number = self._waiting.popleft()
            try:
                pipe.send(worker.number)
            except OSError:
                raise self._killed(pipe) from None
            return
        pipe.close()
        del self._workers[pipe]
        worker.process.join()

    def _killed(self, pipe: Connection[Any, Any]) -> MachineError:
        worker = self._workers[pipe]
        worker.process.join(_EXIT_TIMEOUT_S)
        code = worker.process.exitcode
        ended = (
            f"was killed by signal {-code}"
            if code is not None and code < 0
            else f"exited with code {code}"
        )
        return MachineError(
            f"worker {worker.process.pid} {ended} at shard {worker.number} (out of memory?); rerun "
            "the command, finished shards are kept"
        )


def _serve(
    pipe: Connection[Any, Any], task: Task[Any], parent: int, arguments: Sequence[str]
) -> None:
    # Signals reach all processes of a terminal or job; the parent handles them and closes the pipe.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _die_with(parent)
    # An error of a worker is printed by the parent: its hints must match the user's command.
    remember_arguments(arguments[1], arguments[2:])
    try:
        while True:
            number = pipe.recv()
            pipe.send(_outcome(task, number, pipe))
    except (EOFError, OSError):
        return  # the parent has stopped


def _outcome(task: Task[Any], number: int, pipe: Connection[Any, Any]) -> _Done | _Failed:
    is_closed = False

    def on_progress(update: ProgressUpdate) -> None:
        nonlocal is_closed
        try:
            pipe.send(_Updated(update))
        except OSError:
            is_closed = True
            raise

    try:
        return _Done(task(number, on_progress))
    except Exception as error:
        if is_closed:
            raise
        if not isinstance(error, MovieNetError | OSError):
            error.add_note(traceback.format_exc())  # a bug: its traceback cannot be pickled
        return _Failed(error)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    # The parent may have died before prctl took effect.
    if os.getppid() != parent:
        os._exit(1)
