"""Numbered tasks, in this process or in several of their own.

A worker is started afresh, never forked: no thread and no lock is copied. It has a pipe to its
parent and nothing to share, so killing one can hang nobody; and it dies with its parent, so no
orphan publishes beside the rerun.
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

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

ProgressUpdate = Mapping[str, int]
"""What was just done, e.g. ``{"images": 4400}``."""

OnProgress = Callable[[ProgressUpdate], None]

_LAST_WORDS_S = 10.0
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Task(Protocol[R_co]):
    """Something to do for each number; where there are workers, it is pickled."""

    def __call__(self, number: int, on_progress: OnProgress) -> R_co:
        """Do it; ``tell`` how far it is."""


def run_tasks(
    task: Task[R],
    numbers: Sequence[int],
    *,
    workers: int = 1,
    on_progress: OnProgress = lambda _: None,
) -> list[R]:
    """Do a task for each number; return the results in order.

    Args:
        task: What to do.
        numbers: In this order; a worker that is free takes the next.
        workers: Processes; with one, everything is done in this process.
        on_progress: Called in this process with whatever a task tells.

    Raises:
        MachineError: a worker was killed.
        Exception: whatever a task raised first; the others stop as soon as they tell something.
    """
    if min(workers, len(numbers)) < 2:
        return [task(number, on_progress) for number in numbers]
    with _Crew(task, numbers, workers, on_progress) as crew:
        results = crew.work()
    return [results[number] for number in numbers]


@dataclass(frozen=True)
class _Told:
    news: ProgressUpdate


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


class _Crew(Generic[R]):
    """The workers, by the pipe that leads to each."""

    def __init__(
        self, task: Task[R], numbers: Sequence[int], workers: int, on_progress: OnProgress
    ) -> None:
        self._task, self._on_news = task, on_progress
        self._waiting = deque(numbers)
        self._results: dict[int, R] = {}
        self._workers: dict[Connection[Any, Any], _Worker] = {}
        self._count = min(workers, len(numbers))

    def __enter__(self) -> _Crew[R]:
        return self

    def __exit__(self, *_: object) -> None:
        # Whoever still works meets a closed pipe at its next news, and cleans up behind itself.
        for pipe in self._workers:
            pipe.close()
        for worker in self._workers.values():
            worker.process.join(_LAST_WORDS_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def work(self) -> dict[int, R]:
        """Start the workers, hand out all numbers, return the results."""
        context = multiprocessing.get_context("spawn")
        for _ in range(self._count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._task, os.getpid()))
            process.start()
            theirs.close()
            self._workers[ours] = _Worker(process, self._waiting[0])
            self._next(ours)
        while self._workers:
            for pipe in wait(list(self._workers)):
                if isinstance(pipe, Connection):
                    self._hear(pipe)
        return self._results

    def _hear(self, pipe: Connection[Any, Any]) -> None:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            raise self._lost(pipe) from None
        if isinstance(message, _Told):
            self._on_news(message.news)
        elif isinstance(message, _Failed):
            raise message.error
        else:
            self._results[self._workers[pipe].number] = message.result
            self._next(pipe)

    def _next(self, pipe: Connection[Any, Any]) -> None:
        """Give a worker its next number, or let it go."""
        worker = self._workers[pipe]
        if self._waiting:
            worker.number = self._waiting.popleft()
            try:
                pipe.send(worker.number)
            except OSError:
                raise self._lost(pipe) from None
            return
        pipe.close()
        del self._workers[pipe]
        worker.process.join()

    def _lost(self, pipe: Connection[Any, Any]) -> MachineError:
        worker = self._workers[pipe]
        worker.process.join(_LAST_WORDS_S)
        code = worker.process.exitcode
        ended = f"by signal {-code}" if code is not None and code < 0 else f"with code {code}"
        return MachineError(
            f"worker {worker.process.pid}: ended {ended} at shard {worker.number}, want none to "
            "end; out of memory? run the same command again, what is done stays"
        )


def _serve(pipe: Connection[Any, Any], task: Task[Any], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and closes the pipe
    _die_with(parent)
    try:
        while True:
            number = pipe.recv()
            pipe.send(_outcome(task, number, pipe))
    except (EOFError, OSError):
        return  # the parent has stopped


def _outcome(task: Task[Any], number: int, pipe: Connection[Any, Any]) -> _Done | _Failed:
    closed = False

    def on_progress(news: ProgressUpdate) -> None:
        nonlocal closed
        try:
            pipe.send(_Told(news))
        except OSError:
            closed = True
            raise

    try:
        return _Done(task(number, on_progress))
    except Exception as error:
        if closed:
            raise
        if not isinstance(error, MovieNetError | OSError):
            error.add_note(traceback.format_exc())  # a bug; its traceback does not pass the pipe
        return _Failed(error)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)
