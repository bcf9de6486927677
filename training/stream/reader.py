"""Threads that read the windows of a plan directly into reusable batch buffers.

A thread takes several windows per call, and the source fills their rows of the batch: nothing is
collated, and there are no worker processes. Rows that are not consecutive are read as the ranges
that cover them, then sorted into place. A buffer is borrowed by its batch and returns to the pool
when the last reference to the batch is gone, including tensors, views and prefetching wrappers.

Axes: B = windows of a batch, T = rows of a window, D = feature size, M = movies of the index,
N = rows of one movie to read, S = shots of a window.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from configs.errors import MachineError
from sharding.storage.base import Range
from training.stream.epoch_plan import IntArray, Slice, WindowSpec
from training.stream.read_plan import ROW_TYPE, GatheredRead, ReadPlanner, WindowReads

if TYPE_CHECKING:
    from sharding.features import FeatureSet
    from sharding.storage.base import RangeReader
    from training.stream.shots import Shots

logger = logging.getLogger(__name__)

Features = NDArray[np.float16]

PATIENCE_S = 1.0
"""Seconds that closing waits for reads in progress."""

_LOOK_S = 0.5
"""Seconds between two questions whether a consumer still waits for a batch."""

_PACE_BATCHES = 16
"""Batches after which it is decided again whether to read ahead."""

_PACE_RETRY = 16
"""Decisions that follow a batch that was not in memory, before the next one is tried."""


class AbandonedError(MachineError):
    """The data source did not answer until the consumer stopped waiting."""


def never() -> bool:
    """Return False: wait for every batch."""
    return False


class BorrowedBuffer(NamedTuple):
    """A batch buffer that is being filled."""

    features_BTD: Features
    """Memory of the batch's features."""

    owner: object
    """Owner of the memory: the buffer is returned when this object and all its views are gone."""


class Buffers(Protocol):
    """A provider of memory for batches."""

    def take(self, shape: tuple[int, int, int]) -> BorrowedBuffer:
        """Return unused memory of this shape; its content is undefined."""

    def clear(self) -> None:
        """Release the free buffers."""


class BufferPool:
    """Reusable batch buffers; one is allocated only if no free buffer is large enough.

    Args:
        keep: Maximum number of free buffers; further returned ones are released.
        keep_bytes: Total bytes of all buffers, including borrowed ones, above which a returned
            buffer is released.
    """

    def __init__(self, *, keep: int, keep_bytes: int = 2**63) -> None:
        self.n_allocated = 0
        self._keep, self._keep_bytes = keep, keep_bytes
        self._held_bytes = 0
        self._free: list[NDArray[np.uint8]] = []
        self._loans: dict[int, weakref.ref[Any]] = {}
        # Reentrant: garbage collection during ``take`` may return the buffer of another batch.
        self._lock = threading.RLock()

    def take(self, shape: tuple[int, int, int]) -> BorrowedBuffer:
        """Return an unused buffer; its content is undefined."""
        n_bytes = shape[0] * shape[1] * shape[2] * ROW_TYPE.itemsize
        with self._lock:
            memory = self._find(n_bytes)
        # A new owner for each loan. Its base is a memoryview, which numpy does not look through:
        # every view and every tensor of it keeps this very object alive.
        owner = np.frombuffer(memory.data[:n_bytes], ROW_TYPE)
        # Kept here: a reference that is gone itself calls nothing.
        self._loans[id(memory)] = weakref.ref(owner, partial(self._end_loan, memory))
        return BorrowedBuffer(owner.reshape(shape), owner)

    def clear(self) -> None:
        """Release the free buffers."""
        with self._lock:
            while self._free:
                self._drop(self._free.pop())

    def _find(self, n_bytes: int) -> NDArray[np.uint8]:
        """Return a large enough free buffer, or a new one that replaces a smaller one."""
        enough = [k for k, memory in enumerate(self._free) if len(memory) >= n_bytes]
        if enough:
            # The smallest leaves the others to larger batches. Of equal ones, the last one that was
            # returned may still be in the processor's cache.
            return self._free.pop(min(enough, key=lambda k: (len(self._free[k]), -k)))
        # Batches of complete movies vary in size: the buffers grow, but their number does not.
        if self._free:
            self._drop(self._free.pop(0))
        self.n_allocated += 1
        self._held_bytes += n_bytes
        return np.empty(n_bytes, np.uint8)

    def _end_loan(self, memory: NDArray[np.uint8], _: object) -> None:
        with self._lock:
            del self._loans[id(memory)]
            # A user who keeps many batches returns them all at once: keep only as many as reading
            # ahead needs. Above the byte limit keep none, so that memory falls below it again.
            if len(self._free) < self._keep and self._held_bytes <= self._keep_bytes:
                self._free.append(memory)
            else:
                self._drop(memory)

    def _drop(self, memory: NDArray[np.uint8]) -> None:
        self._held_bytes -= len(memory)


@dataclass
class ReadStats:
    """Amounts read, and the time the consumer waited for them."""

    windows: int = 0
    """Windows with a weight above 0."""

    ranges: int = 0
    """Ranges requested from the source."""

    n_bytes: int = 0
    """Bytes requested from the source."""

    waited_s: float = 0.0
    """Seconds that the consumer waited for batches."""

    seconds: float = 0.0
    """Seconds of iteration, each from its start to the latest batch."""


class ReadSlice(NamedTuple):
    """A slice of the plan with its features."""

    piece: Slice
    features_BTD: Features
    """float16; rows beyond a window's length are zero."""

    owner: object
    """Owner of the memory."""


class _Read(NamedTuple):
    """Amounts that a task requested from the source."""

    ranges: int
    n_bytes: int


Reply = _Read | BaseException


class _Task(NamedTuple):
    """Windows of a batch that one thread reads."""

    read: Callable[[], _Read]
    owner: object
    """Referenced so that the buffer is not returned while it is being filled."""

    replies: SimpleQueue[Reply]


class _Pending(NamedTuple):
    """A batch that is being read."""

    result: ReadSlice
    n_tasks: int
    replies: SimpleQueue[Reply]

    def wait(self, stats: ReadStats, give_up: Callable[[], bool]) -> None:
        """Wait until all windows are read, and count them.

        Raises:
            AbandonedError: ``give_up`` returned True first.
            MovieNetError: the error of a reading thread, unchanged.
        """
        for _ in range(self.n_tasks):
            reply = self._reply(give_up)
            if isinstance(reply, BaseException):
                raise reply
            stats.ranges += reply.ranges
            stats.n_bytes += reply.n_bytes

    def _reply(self, give_up: Callable[[], bool]) -> Reply:
        while True:
            try:
                return self.replies.get(timeout=_LOOK_S)
            except Empty:
                if give_up():
                    raise AbandonedError("stream: the data source does not answer") from None


class Pace:
    """Whether batches are read ahead, or copied when the consumer asks for them.

    Rows in memory are copied about as fast as threads hand them over. As long as the consumer needs
    less time for a batch than it waits for it, nothing is gained by threads that take part of its
    processor. A slower consumer never waits for batches that were read ahead.
    """

    def __init__(self) -> None:
        self.copies = False
        """Whether the next batch is copied when it is asked for."""

        self._batches = self._refused = 0
        self._waited_s = self._used_s = 0.0

    def add(self, waited_s: float, used_s: float) -> None:
        """Count a batch: how long the consumer waited for it, and used the one before."""
        self._batches += 1
        self._waited_s += waited_s
        self._used_s += used_s
        if self._batches == _PACE_BATCHES:
            self._refused -= 1
            self._change(copies=self._waited_s > self._used_s and self._refused <= 0)
            self._batches, self._waited_s, self._used_s = 0, 0.0, 0.0

    def refuse(self) -> None:
        """Read ahead for a while: rows were not in memory."""
        self._refused = _PACE_RETRY
        self._change(copies=False)

    def _change(self, *, copies: bool) -> None:
        if copies != self.copies:
            logger.debug("stream: %s", "copying from memory" if copies else "reading ahead")
        self.copies = copies


class WindowReader:
    """Threads that read slices of a plan; a context manager that stops all of them on exit.

    Args:
        features: The feature set.
        source: Its storage, or a cache in front of it.
        buffers: Memory of the batches.
        spec: Rows of a window.
        threads: Reading threads, unless the source recommends a number.
        stats: Counters to increase.
        shots: Shots of the movies, if a row is the mean of a shot.
        prefetch_bytes: Maximum memory of batches being read; one is always allowed.
        pace: Continued from an earlier reader.
        give_up: Asked while a batch is late; True raises ``AbandonedError``.
    """

    def __init__(
        self,
        features: FeatureSet,
        source: RangeReader,
        buffers: Buffers,
        *,
        spec: WindowSpec,
        threads: int,
        stats: ReadStats,
        shots: Shots | None = None,
        prefetch_bytes: int = 2**63,
        pace: Pace | None = None,
        give_up: Callable[[], bool] = never,
    ) -> None:
        names = [shard.name for shard in features.manifest.shards]
        self._rows = _RowReader(ReadPlanner.of(features, source, spec, shots), source, names)
        self._buffers, self._spec, self._dim = buffers, spec, features.dim
        self._stats, self._prefetch_bytes, self._give_up = stats, prefetch_bytes, give_up
        self._pace = Pace() if pace is None else pace
        self._delivered = 0.0
        """When the consumer got the latest batch, or began."""

        self._process = os.getpid()
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        closing = threading.Event()
        workers = [
            threading.Thread(
                target=_work,
                args=(self._tasks, closing),
                name=f"stream-read-{number}",
                daemon=True,
            )
            for number in range(source.readers or threads)
        ]
        # Also runs before the interpreter exits: after that, daemon threads cannot be joined.
        self._stop = weakref.finalize(self, _stop, self._tasks, closing, workers, self._process)
        for worker in workers:
            worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and wait for them; reads that have not started are skipped.

        A thread that is blocked by an unresponsive server is not waited for. It ends at the time
        limit of the source, and until then keeps only the buffer that it was filling.
        """
        self._stop()

    def read_ahead(
        self, pieces: Iterable[Slice], *, prefetch: int
    ) -> Generator[ReadSlice, None, None]:
        """Yield the slices in order, with up to ``prefetch`` more being read in the background.

        Raises:
            MovieNetError: a thread failed to read, or this is a forked child.
        """
        pending: deque[_Pending] = deque()
        self._delivered = time.perf_counter()
        for piece in pieces:
            check_process(self._process)
            shape = self._shape(piece)
            # One batch is always being read, even if it alone exceeds the limit.
            while pending and (len(pending) > prefetch or self._is_too_large(pending, shape)):
                yield self._deliver(pending)
            check_process(self._process)
            if self._pace.copies and (copied := self._copy(piece, shape)):
                while pending:  # after a time of reading ahead
                    yield self._deliver(pending)
                yield copied
                copied = None  # its buffer is filled next
            else:
                pending.append(self._start(piece, shape))
        while pending:
            yield self._deliver(pending)

    def _is_too_large(self, pending: Iterable[_Pending], shape: tuple[int, int, int]) -> bool:
        held = sum(each.result.features_BTD.nbytes for each in pending)
        return held + shape[0] * shape[1] * shape[2] * ROW_TYPE.itemsize > self._prefetch_bytes

    def _deliver(self, pending: deque[_Pending]) -> ReadSlice:
        """Wait for the first batch, and take it from the queue."""
        check_process(self._process)
        before = time.perf_counter()
        pending[0].wait(self._stats, self._give_up)
        result = pending.popleft().result
        self._count(result, before)
        return result

    def n_rows(self, piece: Slice) -> int:
        """Return T, the rows of each window in the batch of a slice."""
        window = self._spec.window
        return int(piece.length.max()) if window is None else window

    def _shape(self, piece: Slice) -> tuple[int, int, int]:
        return len(piece.movie), self.n_rows(piece), self._dim

    def _copy(self, piece: Slice, shape: tuple[int, int, int]) -> ReadSlice | None:
        """Return a slice that was copied from memory; None if not all of it is there."""
        before = time.perf_counter()
        buffer = self._buffers.take(shape)
        read = self._rows.copied(piece, buffer.features_BTD)
        if read is None:
            self._pace.refuse()
            return None
        self._stats.ranges += read.ranges
        self._stats.n_bytes += read.n_bytes
        result = ReadSlice(piece, *buffer)
        self._count(result, before)
        return result

    def _count(self, result: ReadSlice, before: float) -> None:
        """Update the statistics with a batch that the consumer waited for since ``before``."""
        now = time.perf_counter()
        self._stats.waited_s += now - before
        self._stats.seconds += now - self._delivered
        self._stats.windows += int(np.count_nonzero(result.piece.weight))
        self._pace.add(waited_s=now - before, used_s=before - self._delivered)
        self._delivered = now

    def _start(self, piece: Slice, shape: tuple[int, int, int]) -> _Pending:
        """Queue the windows of a slice for the threads."""
        buffer = self._buffers.take(shape)
        reads = self._rows.reads(piece, buffer.features_BTD)
        replies: SimpleQueue[Reply] = SimpleQueue()
        for read in reads:
            self._tasks.put(_Task(read, buffer.owner, replies))
        return _Pending(ReadSlice(piece, *buffer), len(reads), replies)


class _RowReader:
    """Executor of the read plan of slices, in calls that the threads share."""

    def __init__(self, planner: ReadPlanner, source: RangeReader, names: Sequence[str]) -> None:
        self._planner, self._source = planner, source
        self._names = names
        """File name by shard number."""

    def reads(self, piece: Slice, features_BTD: Features) -> list[Callable[[], _Read]]:
        """Return the calls that fill a batch with the windows of a slice."""
        if not self._planner.is_contiguous:
            calls = self._planner.calls(len(piece.movie))
            return [partial(self._gather, piece, features_BTD, call) for call in calls]
        reads = self._planner.windows(piece)
        names = [self._names[shard] for shard in reads.shard_B.tolist()]
        ranges = list(map(Range, names, reads.offset_B.tolist()))
        buffers, padding = _row_views(reads, features_BTD)
        return [
            partial(_read_windows, self._source, ranges[call], buffers[call], padding[call])
            for call in reads.calls
        ]

    def copied(self, piece: Slice, features_BTD: Features) -> _Read | None:
        """Fill a batch from memory; return None if this is not possible at once."""
        if not self._planner.is_contiguous:
            return None
        shard_B, offset_B, n_bytes_B = self._planner.places(piece)
        names = [self._names[shard] for shard in shard_B.tolist()]
        rows = _filled_rows(n_bytes_B, features_BTD)
        if not self._source.copy_cached(names, offset_B.tolist(), rows):
            return None
        return _Read(len(names), int(n_bytes_B.sum()))

    def _gather(self, piece: Slice, features_BTD: Features, call: slice) -> _Read:
        """Read windows whose rows are not consecutive, or are means of shots."""
        done = [
            self._gather_one(self._planner.gathered(piece, window), features_BTD[window])
            for window in range(call.start, call.stop)
        ]
        return _Read(sum(each.ranges for each in done), sum(each.n_bytes for each in done))

    def _gather_one(self, read: GatheredRead, window_TD: Features) -> _Read:
        sizes_S = read.shot_rows_S
        if sizes_S is None:
            window_TD[len(read.row_N) :] = 0
            return self._read_rows(read, window_TD[: len(read.row_N)])
        frames_ND = np.empty((len(read.row_N), window_TD.shape[1]), ROW_TYPE)
        done = self._read_rows(read, frames_ND)
        firsts_S = np.cumsum(sizes_S) - sizes_S
        # Summed in float32: float16 would overflow, and lose precision in long shots.
        sums_SD = np.add.reduceat(frames_ND, firsts_S, axis=0, dtype=np.float32)
        window_TD[: len(sizes_S)] = sums_SD / sizes_S[:, None]
        window_TD[len(sizes_S) :] = 0
        return done

    def _read_rows(self, read: GatheredRead, rows_ND: Features) -> _Read:
        """Read the ranges of a window and copy its rows, in window order, into ``rows_ND``."""
        n_rows = int(read.first_R[-1] + read.end_R[-1] - read.begin_R[-1])
        in_place = read.is_one_run  # the range is the window itself, so no copy is needed
        covered_ND = rows_ND if in_place else np.empty((n_rows, rows_ND.shape[1]), ROW_TYPE)
        name, row_bytes = self._names[read.shard], self._planner.row_bytes
        view = _bytes_of(covered_ND)
        edges = (np.append(read.first_R, n_rows) * row_bytes).tolist()
        self._source.read_into(
            [Range(name, read.offset + begin * row_bytes) for begin in read.begin_R.tolist()],
            [view[edge:end] for edge, end in pairwise(edges)],
        )
        if not in_place:
            np.take(covered_ND, read.place_N, axis=0, out=rows_ND)
        return _Read(len(read.begin_R), len(view))


def _filled_rows(n_bytes_B: IntArray, features_BTD: Features) -> list[NDArray[np.uint8]]:
    """Return the bytes of each window that a range fills, after zeroing its padding rows."""
    rows = list(features_BTD.reshape(len(features_BTD), -1).view(np.uint8))
    for window in np.flatnonzero(n_bytes_B < features_BTD[0].nbytes).tolist():
        n_bytes = int(n_bytes_B[window])
        rows[window][n_bytes:] = 0
        rows[window] = rows[window][:n_bytes]
    return rows


def _row_views(
    reads: WindowReads, features_BTD: Features
) -> tuple[list[memoryview], list[memoryview]]:
    """Return views of each range's rows in a batch, and of the padding rows after them."""
    view, size = _bytes_of(features_BTD), features_BTD[0].nbytes
    begin_B = reads.window_B * size
    begins, ends = begin_B.tolist(), (begin_B + reads.n_bytes_B).tolist()
    return (
        [view[begin:end] for begin, end in zip(begins, ends, strict=True)],
        [view[end : begin + size] for begin, end in zip(begins, ends, strict=True)],
    )


def _bytes_of(features: Features) -> memoryview:
    return features.reshape(-1).view(np.uint8).data


def _read_windows(
    source: RangeReader,
    ranges: Sequence[Range],
    buffers: Sequence[memoryview],
    padding: Sequence[memoryview],
) -> _Read:
    # A reused buffer contains rows of an earlier batch, so padding rows are zeroed each time.
    for rows in padding:
        if len(rows):
            np.frombuffer(rows, np.uint8).fill(0)
    source.read_into(ranges, buffers)
    return _Read(len(ranges), sum(map(len, buffers)))


def check_process(process: int) -> None:
    """Refuse to continue in a child that was forked from ``process``.

    Raises:
        MachineError: the current process is not ``process``.
    """
    current = os.getpid()
    if current != process:
        raise MachineError(
            f"stream: got used in process {current}, want process {process}, which created it: "
            "reading threads do not survive a fork; use the stream without DataLoader workers, or "
            "create it in the child process"
        )


def _work(tasks: SimpleQueue[_Task | None], closing: threading.Event) -> None:
    while (task := tasks.get()) is not None:
        # Reply even when closing: a consumer that is still waiting must not block forever.
        reply: Reply = _Read(0, 0)
        if not closing.is_set():
            try:
                reply = task.read()
            except BaseException as caught:  # noqa: BLE001  # the consumer raises it
                reply = caught
        task.replies.put(reply)
        # While this thread waits for its next task, it must not keep this batch alive.
        del task, reply


def _stop(
    tasks: SimpleQueue[_Task | None],
    closing: threading.Event,
    workers: Sequence[threading.Thread],
    process: int,
) -> None:
    if os.getpid() != process:
        return  # a forked child inherits the lists, but not the threads
    closing.set()
    for _ in workers:
        tasks.put(None)
    join_soon(workers)


def join_soon(threads: Iterable[threading.Thread]) -> None:
    """Wait up to ``PATIENCE_S`` for threads that are ending; do not wait for longer reads."""
    deadline = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
