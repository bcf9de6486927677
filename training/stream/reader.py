"""Threads that read the windows of a plan directly into reusable batch buffers.

A thread takes several windows per call, and the source fills their rows of the batch: nothing is
collated, and there are no worker processes. Rows that are not consecutive are read as the ranges
that cover them, then sorted into place. A buffer is borrowed by its batch and returns to the pool
when the last reference to the batch is gone, including tensors, views and prefetching wrappers.

Axes: B = windows of a batch, T = rows of a window, D = feature size, M = movies of the index,
N = rows of one movie to read, S = shots of a window.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from configs.errors import MachineError
from sharding.storage.base import Range
from training.stream.epoch_plan import Slice, WindowSpec
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

_PLAN_BATCHES = 64
"""Batches that are planned at once: the first one takes as long as the next 15."""


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

    rows: list[NDArray[np.uint8]]
    """Bytes of each window, to be filled; these views do not keep the buffer."""


class Buffers(Protocol):
    """A provider of memory for batches."""

    def take(self, shape: tuple[int, int, int]) -> BorrowedBuffer:
        """Return unused memory of this shape; its content is undefined."""

    def clear(self) -> None:
        """Release the free buffers."""


class _Bytes(NDArray[np.uint8]):
    """Bytes of the pool.

    numpy replaces the base of a view by the base of that base, but only among arrays of one class.
    So every view and every tensor of a plain view of these bytes keeps that very view alive.
    """


class _Memory:
    """Memory of one batch at a time, with views that the next batch of the same shape reuses."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._bytes = _Bytes(n_bytes, np.uint8)
        self._shape: tuple[int, ...] = ()

    def lend(self, shape: tuple[int, int, int]) -> BorrowedBuffer:
        """Return the memory with a new owner."""
        if shape != self._shape:
            rows_BN = self._bytes[: _n_bytes(shape)].reshape(shape[0], -1)
            self._features_BTD = rows_BN.view(ROW_TYPE).reshape(shape)
            self._rows = list(rows_BN.view(np.ndarray))
            self._shape = shape
        owner = self._features_BTD.view(np.ndarray)
        return BorrowedBuffer(owner, owner, self._rows)


def _n_bytes(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2] * ROW_TYPE.itemsize


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
        self._free: list[_Memory] = []
        self._loans: dict[int, weakref.ref[Any]] = {}
        # Reentrant: garbage collection during ``take`` may return the buffer of another batch.
        self._lock = threading.RLock()

    def take(self, shape: tuple[int, int, int]) -> BorrowedBuffer:
        """Return an unused buffer; its content is undefined."""
        with self._lock:
            memory = self._find(_n_bytes(shape))
        buffer = memory.lend(shape)
        # Kept here: a reference that is gone itself calls nothing.
        self._loans[id(memory)] = weakref.ref(buffer.owner, partial(self._end_loan, memory))
        return buffer

    def clear(self) -> None:
        """Release the free buffers."""
        with self._lock:
            while self._free:
                self._drop(self._free.pop())

    def _find(self, n_bytes: int) -> _Memory:
        """Return a large enough free buffer, or a new one that replaces a smaller one."""
        # The smallest leaves the others to larger batches. Of equal ones, the last one that was
        # returned may still be in the processor's cache.
        if self._free and self._free[-1].n_bytes == n_bytes:  # nearly always
            return self._free.pop()
        sizes = [memory.n_bytes for memory in self._free]
        enough = [k for k, size in enumerate(sizes) if size >= n_bytes]
        if enough:
            return self._free.pop(min(enough, key=lambda k: (sizes[k], -k)))
        # Batches of complete movies vary in size: the buffers grow, but their number does not.
        if self._free:
            self._drop(self._free.pop(0))
        self.n_allocated += 1
        self._held_bytes += n_bytes
        return _Memory(n_bytes)

    def _end_loan(self, memory: _Memory, _: object) -> None:
        with self._lock:
            del self._loans[id(memory)]
            # A user who keeps many batches returns them all at once: keep only as many as reading
            # ahead needs. Above the byte limit keep none, so that memory falls below it again.
            if len(self._free) < self._keep and self._held_bytes <= self._keep_bytes:
                self._free.append(memory)
            else:
                self._drop(memory)

    def _drop(self, memory: _Memory) -> None:
        self._held_bytes -= memory.n_bytes


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
    n_windows: int
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
        for planned in itertools.chain.from_iterable(self._planned(pieces)):
            # One batch is always being read, even if it alone exceeds the limit.
            while pending and (
                len(pending) > prefetch or self._is_too_large(pending, planned.shape)
            ):
                yield self._deliver(pending)
            check_process(self._process)
            if self._copies and (copied := self._copy(planned)):
                while pending:  # after a time of reading ahead
                    yield self._deliver(pending)
                yield copied
                copied = None  # its buffer is filled next
            else:
                pending.append(self._start(planned))
        while pending:
            yield self._deliver(pending)

    @property
    def _copies(self) -> bool:
        """Whether the next batch is to be copied."""
        return self._pace.copies and self._rows.can_copy

    def _planned(self, pieces: Iterable[Slice]) -> Iterator[list[_Planned]]:
        """Yield the slices in groups, with their places if they may be copied from memory."""
        rest = iter(pieces)
        # Several at once: this code then stays in the processor's cache, which rows displace.
        while group := list(itertools.islice(rest, _PLAN_BATCHES)):
            copies = self._copies
            yield [
                _Planned(
                    piece=piece,
                    n_windows=int(np.count_nonzero(piece.weight)),
                    shape=(len(piece.movie), self.n_rows(piece), self._dim),
                    places=self._rows.places(piece, self.n_rows(piece)) if copies else None,
                )
                for piece in group
            ]

    def _is_too_large(self, pending: Iterable[_Pending], shape: tuple[int, int, int]) -> bool:
        held = sum(each.result.features_BTD.nbytes for each in pending)
        return held + _n_bytes(shape) > self._prefetch_bytes

    def _deliver(self, pending: deque[_Pending]) -> ReadSlice:
        """Wait for the first batch, and take it from the queue."""
        check_process(self._process)
        before = time.perf_counter()
        pending[0].wait(self._stats, self._give_up)
        result, n_windows, *_ = pending.popleft()
        self._count(n_windows, before)
        return result

    def n_rows(self, piece: Slice) -> int:
        """Return T, the rows of each window in the batch of a slice."""
        window = self._spec.window
        return int(piece.length.max()) if window is None else window

    def _copy(self, planned: _Planned) -> ReadSlice | None:
        """Return a slice that was copied from memory; None if not all of it is there."""
        places = planned.places or self._rows.places(planned.piece, planned.shape[1])
        before = time.perf_counter()
        buffer = self._buffers.take(planned.shape)
        if not self._rows.copy(places, buffer.rows):
            self._pace.refuse()
            return None
        self._stats.ranges += len(places.names)
        self._stats.n_bytes += places.n_bytes
        self._count(planned.n_windows, before)
        return ReadSlice(planned.piece, buffer.features_BTD, buffer.owner)

    def _count(self, n_windows: int, before: float) -> None:
        """Update the statistics with a batch that the consumer waited for since ``before``."""
        now = time.perf_counter()
        self._stats.waited_s += now - before
        self._stats.seconds += now - self._delivered
        self._stats.windows += n_windows
        self._pace.add(waited_s=now - before, used_s=before - self._delivered)
        self._delivered = now

    def _start(self, planned: _Planned) -> _Pending:
        """Queue the windows of a slice for the threads."""
        buffer = self._buffers.take(planned.shape)
        reads = self._rows.reads(planned.piece, buffer.features_BTD)
        replies: SimpleQueue[Reply] = SimpleQueue()
        for read in reads:
            self._tasks.put(_Task(read, buffer.owner, replies))
        result = ReadSlice(planned.piece, buffer.features_BTD, buffer.owner)
        return _Pending(result, planned.n_windows, len(reads), replies)


class _Places(NamedTuple):
    """Where the windows of a slice are stored, each as one range."""

    names: list[str]
    """File of each window."""

    offsets: list[int]
    """First byte of each window."""

    short: list[tuple[int, int]]
    """(window, bytes) of the windows that do not fill their rows of the batch."""

    n_bytes: int
    """Bytes of all windows."""


class _Planned(NamedTuple):
    """A slice to read."""

    piece: Slice
    n_windows: int
    """Windows with a weight above 0."""

    shape: tuple[int, int, int]
    """Shape of its features."""

    places: _Places | None
    """None: when it was planned, batches were read ahead."""


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

    @property
    def can_copy(self) -> bool:
        """Whether windows can be copied from memory."""
        return self._planner.is_contiguous

    def places(self, piece: Slice, n_rows: int) -> _Places:
        """Return the places of a slice whose windows have up to ``n_rows`` rows."""
        shard_B, offset_B, n_bytes_B = self._planner.places(piece)
        sizes, full = n_bytes_B.tolist(), n_rows * self._planner.row_bytes
        return _Places(
            names=[self._names[shard] for shard in shard_B.tolist()],
            offsets=offset_B.tolist(),
            short=[(window, size) for window, size in enumerate(sizes) if size < full],
            n_bytes=sum(sizes),
        )

    def copy(self, places: _Places, rows: list[NDArray[np.uint8]]) -> bool:
        """Fill a batch from memory; return False if not all of it is there."""
        if places.short:
            rows = list(rows)
            for window, size in places.short:
                rows[window][size:] = 0
                rows[window] = rows[window][:size]
        return self._source.copy_cached(places.names, places.offsets, rows)

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
            [view[edge:end] for edge, end in itertools.pairwise(edges)],
        )
        if not in_place:
            np.take(covered_ND, read.place_N, axis=0, out=rows_ND)
        return _Read(len(read.begin_R), len(view))


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
