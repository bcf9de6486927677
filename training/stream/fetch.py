"""Reads what the plan names: a few threads, straight into reused batch buffers.

A thread takes several windows at a time and has the storage fill their places in the batch; there
is no copy, no collating and no worker process. A buffer is lent with its batch and comes back when
nobody holds the batch any more: not its tensor, not a slice of it, not a wrapper that reads ahead.

Axes: B = windows of a batch, T = rows of a window, D = feature size, M = movies of the index.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from configs.errors import MachineError
from sharding.storage import Range
from training.stream.plan import IntArray, Slice, frame_order

if TYPE_CHECKING:
    from sharding.features import FeatureSet
    from sharding.storage import Source

ROW_TYPE = np.dtype("<f2")
"""Type of a feature on disk and in a batch."""

Features = NDArray[np.float16]


class Lent(NamedTuple):
    """A batch buffer while it is filled."""

    features_BTD: Features
    """What the batch holds; the buffer comes back when this and all its views are gone."""

    windows: Sequence[memoryview]
    """The bytes of each window."""


class _Buffer:
    """Memory of one batch, and the places of its windows."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        n_windows, n_rows, dim = shape
        self.memory = np.empty((n_windows, n_rows * dim * ROW_TYPE.itemsize), np.uint8)
        self.windows = [window.data for window in self.memory]


class Ring:
    """Batch buffers that are used again; a new one is made only if none is free.

    Args:
        shape: (B, T, D) of every batch.
        keep: Free buffers that are kept; what comes back beyond that is let go.
    """

    def __init__(self, shape: tuple[int, int, int], *, keep: int) -> None:
        self.made = 0
        self._shape, self._keep = shape, keep
        self._free: deque[_Buffer] = deque()

    def take(self) -> Lent:
        """Return a buffer that nobody holds; its content is whatever was there before."""
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = _Buffer(self._shape)
            self.made += 1
        # A fresh owner for each loan. Its base is a memoryview, so numpy does not look through it:
        # every view and every tensor made of it keeps this very object alive.
        owner = np.frombuffer(buffer.memory.reshape(-1).data, ROW_TYPE)
        weakref.finalize(owner, _give_back, self._free, buffer, self._keep).atexit = False
        return Lent(owner.reshape(self._shape), buffer.windows)

    def clear(self) -> None:
        """Let go of the free buffers."""
        self._free.clear()


def _give_back(free: deque[_Buffer], buffer: _Buffer, keep: int) -> None:
    if len(free) < keep:
        free.append(buffer)


@dataclass
class ReadStats:
    """What was read, and how long the consumer waited for it."""

    windows: int = 0
    """Windows of weight above 0."""

    n_bytes: int = 0
    """Bytes asked of the storage."""

    waited_s: float = 0.0
    """Seconds that the consumer waited for batches."""

    seconds: float = 0.0
    """Seconds from the start of each iteration to its last batch so far."""


class Fetched(NamedTuple):
    """A slice of the plan with its rows."""

    piece: Slice
    features_BTD: Features
    """float16; rows beyond ``length_B`` are zero."""

    length_B: IntArray
    """Rows of each window, 1 to T."""


class _Task(NamedTuple):
    """Some windows of a batch, for one thread."""

    ranges: Sequence[Range]
    targets: Sequence[memoryview]
    orders: Sequence[IntArray] | None
    """Rows of each window, relative to its range, where rows are permuted."""

    tails: Sequence[NDArray[np.uint8]]
    """What must be cleared."""

    features_BTD: Features
    """Held so that the buffer cannot come back while it is written."""

    replies: SimpleQueue[BaseException | None]


class _Pending(NamedTuple):
    """A batch under way."""

    fetched: Fetched
    n_tasks: int
    replies: SimpleQueue[BaseException | None]

    def wait(self) -> Fetched:
        """Return the batch when all its windows are read.

        Raises:
            MovieNetError: what a thread met, as it met it.
        """
        for _ in range(self.n_tasks):
            error = self.replies.get()
            if error is not None:
                raise error
        return self.fetched


class Fetcher:
    """Threads that read slices of a plan; a context manager that leaves no thread behind.

    Args:
        features: The feature set.
        source: Where its bytes are read: its storage, or a cache that stands before it.
        ring: Buffers of shape (B, T, D).
        frames: Rows of a window, T.
        threads: Reading threads.
        shuffle_seed: Permute each movie's rows by (seed, movie) before its windows are cut.
        stats: Counted up.
    """

    def __init__(
        self,
        features: FeatureSet,
        source: Source,
        ring: Ring,
        *,
        frames: int,
        threads: int,
        shuffle_seed: int | None,
        stats: ReadStats,
    ) -> None:
        self._index, self._dim = features.index, features.dim
        self._shards = [shard.name for shard in features.manifest.shards]
        self._ring, self._frames, self._shuffle_seed = ring, frames, shuffle_seed
        self._windows_a_task = source.ranges_a_call
        self._stats = stats
        self._process = os.getpid()
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        closing = threading.Event()
        workers = [
            threading.Thread(
                target=_work,
                args=(source, self._tasks, closing),
                name=f"stream-read-{number}",
                daemon=True,
            )
            for number in range(threads)
        ]
        # Also runs before the interpreter ends: afterwards daemon threads can no longer be joined.
        self._stop = weakref.finalize(self, _stop, self._tasks, closing, workers, self._process)
        for worker in workers:
            worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and wait for them; what is not yet begun is not read."""
        self._stop()

    def read_ahead(self, pieces: Iterable[Slice], *, prefetch: int) -> Iterator[Fetched]:
        """Yield the slices in order, with ``prefetch`` more always under way.

        Raises:
            MovieNetError: what a thread met; or this is a forked child.
        """
        under_way: deque[_Pending] = deque()
        begin = time.perf_counter()
        for piece in pieces:
            check_process(self._process)
            under_way.append(self._start(piece))
            if len(under_way) > prefetch:
                begin = self._wait(under_way[0], begin)
                yield under_way.popleft().fetched
        while under_way:
            check_process(self._process)
            begin = self._wait(under_way[0], begin)
            yield under_way.popleft().fetched

    def _wait(self, pending: _Pending, begin: float) -> float:
        """Wait for a batch, count it and return the time."""
        asked = time.perf_counter()
        pending.wait()
        now = time.perf_counter()
        self._stats.waited_s += now - asked
        self._stats.seconds += now - begin
        self._stats.windows += int(np.count_nonzero(pending.fetched.piece.weight))
        return now

    def _start(self, piece: Slice) -> _Pending:
        """Hand the windows of a slice to the threads."""
        lent = self._ring.take()
        row_bytes = self._dim * ROW_TYPE.itemsize
        rows_B = self._index.rows[piece.movie].astype(np.int64)
        length_B = np.minimum(rows_B - piece.start, self._frames)
        ranges, orders = self._ranges(piece, rows_B, length_B, row_bytes)
        n_bytes = (length_B * row_bytes).tolist()
        targets = [window[:end] for window, end in zip(lent.windows, n_bytes, strict=True)]
        replies: SimpleQueue[BaseException | None] = SimpleQueue()
        firsts = range(0, len(targets), self._windows_a_task)
        for first in firsts:
            some = slice(first, first + self._windows_a_task)
            tails = [
                np.frombuffer(window[end:], np.uint8)
                for window, end in zip(lent.windows[some], n_bytes[some], strict=True)
                if end < len(window)
            ]
            some_orders = orders[some] if orders is not None else None
            self._tasks.put(
                _Task(ranges[some], targets[some], some_orders, tails, lent.features_BTD, replies)
            )
        return _Pending(Fetched(piece, lent.features_BTD, length_B), len(firsts), replies)

    def _ranges(
        self, piece: Slice, rows_B: IntArray, length_B: IntArray, row_bytes: int
    ) -> tuple[list[Range], list[IntArray] | None]:
        """Return where each window lies and, if rows are permuted, its rows from there on."""
        first_B, orders = piece.start, None
        if self._shuffle_seed is not None:
            # The covering range of a permuted window: nearly the whole movie.
            orders = [
                frame_order(self._shuffle_seed, movie, n_rows)[start : start + length]
                for movie, n_rows, start, length in zip(
                    piece.movie.tolist(),
                    rows_B.tolist(),
                    piece.start.tolist(),
                    length_B.tolist(),
                    strict=True,
                )
            ]
            first_B = np.array([order.min() for order in orders], np.int64)
            orders = [order - order.min() for order in orders]
            covered = sum(int(order.max()) + 1 for order in orders)
        else:
            covered = int(length_B.sum())
        self._stats.n_bytes += covered * row_bytes
        offset_B = self._index.offset[piece.movie].astype(np.int64) + first_B * row_bytes
        names = [self._shards[number] for number in self._index.shard[piece.movie].tolist()]
        ranges = [Range(*place) for place in zip(names, offset_B.tolist(), strict=True)]
        return ranges, orders


def check_process(process: int) -> None:
    """Refuse to go on in a child that was forked from ``process``.

    Raises:
        MachineError: this is another process.
    """
    here = os.getpid()
    if here != process:
        raise MachineError(
            f"stream: used in process {here}, made in {process}: reading threads do not survive a "
            "fork; use it where it was made (no DataLoader workers), or make it in the child"
        )


def _work(source: Source, tasks: SimpleQueue[_Task | None], closing: threading.Event) -> None:
    while (task := tasks.get()) is not None:
        error: BaseException | None = None
        if not closing.is_set():
            try:
                _read(source, task)
            except BaseException as caught:  # noqa: BLE001  # the consumer raises it
                error = caught
        task.replies.put(error)
        # While this thread waits for the next task it must not hold this one's batch.
        del task, error


def _read(source: Source, task: _Task) -> None:
    for tail in task.tails:
        tail.fill(0)
    if task.orders is None:
        source.read_into(task.ranges, task.targets)
        return
    for part, target, order in zip(task.ranges, task.targets, task.orders, strict=True):
        row_bytes = len(target) // len(order)
        rows = np.empty((int(order.max()) + 1, row_bytes), np.uint8)
        source.read_into([part], [rows.reshape(-1).data])
        np.take(rows, order, axis=0, out=np.frombuffer(target, np.uint8).reshape(-1, row_bytes))


def _stop(
    tasks: SimpleQueue[_Task | None],
    closing: threading.Event,
    workers: Sequence[threading.Thread],
    process: int,
) -> None:
    if os.getpid() != process:
        return
    closing.set()
    for _ in workers:
        tasks.put(None)
    for worker in workers:
        worker.join()
