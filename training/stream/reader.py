"""Reads what the plan names: a few threads, straight into reused batch buffers.

A thread takes several windows at a time and has the source fill their places in the batch; there is
no collating and no worker process. Rows that do not lie side by side are read by the ranges that
cover them, and sorted into place. A buffer is lent with its batch and comes back when nobody holds
the batch any more: not its tensor, not a slice of it, not a wrapper that reads ahead.

Axes: B = windows of a batch, T = rows of a window, D = feature size, M = movies of the index,
N = rows of one movie that are wanted.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

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

Features = NDArray[np.float16]

PATIENCE_S = 1.0
"""How long closing waits for a read that has begun."""


class BorrowedBuffer(NamedTuple):
    """A batch buffer while it is filled."""

    features_BTD: Features
    """What the batch holds."""

    owner: object
    """What the memory belongs to; the buffer comes back when this and all its views are gone."""


class Buffers(Protocol):
    """Where the memory of batches comes from."""

    def take(self, shape: tuple[int, int, int]) -> BorrowedBuffer:
        """Return memory of this shape that nobody holds; its content is anything."""

    def clear(self) -> None:
        """Let go of what is free."""


class BufferPool:
    """Batch buffers that are used again; a new one is made only if no free one is large enough.

    Args:
        keep: Free buffers that are kept; what comes back beyond that is let go.
        keep_bytes: Bytes of all buffers, lent ones too, beyond which none is kept.
    """

    def __init__(self, *, keep: int, keep_bytes: int = 2**63) -> None:
        self.made = 0
        self._keep, self._keep_bytes = keep, keep_bytes
        self._held_bytes = 0
        self._free: deque[NDArray[np.uint8]] = deque()
        # Whoever drops a batch gives its buffer back, also from within ``take``.
        self._lock = threading.RLock()

    def take(self, shape: tuple[int, int, int]) -> BorrowedBuffer:
        """Return a buffer that nobody holds; its content is whatever was there before."""
        n_bytes = shape[0] * shape[1] * shape[2] * ROW_TYPE.itemsize
        with self._lock:
            memory = self._find(n_bytes)
        # A fresh owner for each loan. Its base is a memoryview, so numpy does not look through it:
        # every view and every tensor made of it keeps this very object alive.
        owner = np.frombuffer(memory.data[:n_bytes], ROW_TYPE)
        # Not at exit: the interpreter frees all memory anyway, and the order is then arbitrary.
        weakref.finalize(owner, self._give_back, memory).atexit = False
        return BorrowedBuffer(owner.reshape(shape), owner)

    def clear(self) -> None:
        """Let go of the free buffers."""
        with self._lock:
            while self._free:
                self._drop(self._free.popleft())

    def _find(self, n_bytes: int) -> NDArray[np.uint8]:
        """Return a free buffer that is large enough; or a new one, in place of one too small."""
        # Rotates the queue once, which leaves the buffers that are too small in their order.
        for _ in range(len(self._free)):
            memory = self._free.popleft()
            if len(memory) >= n_bytes:
                return memory
            self._free.append(memory)
        # One too small goes for the new one: batches of complete movies grow, and the ring with
        # them, but not their number.
        if self._free:
            self._drop(self._free.popleft())
        self.made += 1
        self._held_bytes += n_bytes
        return np.empty(n_bytes, np.uint8)

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            # A user who keeps many batches returns them all at once: only what reading ahead needs
            # is kept. Over the byte limit none is, so that memory falls back below it.
            if len(self._free) < self._keep and self._held_bytes <= self._keep_bytes:
                self._free.append(memory)
            else:
                self._drop(memory)

    def _drop(self, memory: NDArray[np.uint8]) -> None:
        self._held_bytes -= len(memory)


@dataclass
class ReadStats:
    """What was read, and how long the consumer waited for it."""

    windows: int = 0
    """Windows of weight above 0."""

    ranges: int = 0
    """Ranges asked of the source."""

    n_bytes: int = 0
    """Bytes asked of the source."""

    waited_s: float = 0.0
    """Seconds that the consumer waited for batches."""

    seconds: float = 0.0
    """Seconds from the start of each iteration to its last batch so far."""


class ReadSlice(NamedTuple):
    """A slice of the plan with its rows."""

    piece: Slice
    features_BTD: Features
    """float16; rows beyond a window's length are zero."""

    owner: object
    """What the memory belongs to."""


class _Read(NamedTuple):
    """What a task has asked of the source."""

    ranges: int
    n_bytes: int


Reply = _Read | BaseException


class _Task(NamedTuple):
    """Some windows of a batch, for one thread."""

    read: Callable[[], _Read]
    owner: object
    """Held so that the buffer cannot come back while it is written."""

    replies: SimpleQueue[Reply]


class _Pending(NamedTuple):
    """A batch under way."""

    fetched: ReadSlice
    n_tasks: int
    replies: SimpleQueue[Reply]

    def wait(self, stats: ReadStats) -> None:
        """Return when all windows are read.

        Raises:
            MovieNetError: what a thread met, as it met it.
        """
        for _ in range(self.n_tasks):
            reply = self.replies.get()
            if isinstance(reply, BaseException):
                raise reply
            stats.ranges += reply.ranges
            stats.n_bytes += reply.n_bytes


class WindowReader:
    """Threads that read slices of a plan; a context manager that leaves no thread behind.

    Args:
        features: The feature set.
        source: Where its bytes are read: its storage, or a cache that stands before it.
        buffers: Memory of batches.
        cut: Which rows a window has.
        threads: Reading threads, where the source asks for no number.
        stats: Counted up.
        shots: Where shots begin, if a row is the mean of one.
        ahead_bytes: Most memory of batches under way; one always is.
    """

    def __init__(
        self,
        features: FeatureSet,
        source: RangeReader,
        buffers: Buffers,
        *,
        cut: WindowSpec,
        threads: int,
        stats: ReadStats,
        shots: Shots | None = None,
        ahead_bytes: int = 2**63,
    ) -> None:
        names = [shard.name for shard in features.manifest.shards]
        self._rows = _RowReader(ReadPlanner.of(features, source, cut, shots), source, names)
        self._buffers, self._cut, self._dim = buffers, cut, features.dim
        self._stats, self._ahead_bytes = stats, ahead_bytes
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
        # Also runs before the interpreter ends: afterwards daemon threads can no longer be joined.
        self._stop = weakref.finalize(self, _stop, self._tasks, closing, workers, self._process)
        for worker in workers:
            worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and wait for them; what is not yet begun is not read.

        A thread that waits for a silent server is not waited for: it ends alone when the source's
        time limit is over, and until then holds nothing but the buffer it would have filled.
        """
        self._stop()

    def read_ahead(self, pieces: Iterable[Slice], *, prefetch: int) -> Iterator[ReadSlice]:
        """Yield the slices in order, with ``prefetch`` more always under way.

        Raises:
            MovieNetError: what a thread met; or this is a forked child.
        """
        under_way: deque[_Pending] = deque()
        n_bytes = 0
        begin = time.perf_counter()
        for piece in pieces:
            check_process(self._process)
            shape = self._shape(piece)
            size = shape[0] * shape[1] * shape[2] * ROW_TYPE.itemsize
            # One batch is always under way, even if it alone is larger than the limit.
            while under_way and (len(under_way) > prefetch or n_bytes + size > self._ahead_bytes):
                begin = self._wait(under_way[0], begin)
                n_bytes -= under_way[0].fetched.features_BTD.nbytes
                yield under_way.popleft().fetched
                check_process(self._process)
            under_way.append(self._start(piece, shape))
            n_bytes += size
        while under_way:
            check_process(self._process)
            begin = self._wait(under_way[0], begin)
            yield under_way.popleft().fetched

    def _shape(self, piece: Slice) -> tuple[int, int, int]:
        frames = self._cut.window
        n_rows = int(piece.length.max()) if frames is None else frames
        return len(piece.movie), n_rows, self._dim

    def _wait(self, pending: _Pending, begin: float) -> float:
        """Wait for a batch, count it and return the time."""
        asked = time.perf_counter()
        pending.wait(self._stats)
        now = time.perf_counter()
        self._stats.waited_s += now - asked
        self._stats.seconds += now - begin
        self._stats.windows += int(np.count_nonzero(pending.fetched.piece.weight))
        return now

    def _start(self, piece: Slice, shape: tuple[int, int, int]) -> _Pending:
        """Hand the windows of a slice to the threads."""
        lent = self._buffers.take(shape)
        reads = self._rows.reads(piece, lent.features_BTD)
        replies: SimpleQueue[Reply] = SimpleQueue()
        for read in reads:
            self._tasks.put(_Task(read, lent.owner, replies))
        return _Pending(ReadSlice(piece, *lent), len(reads), replies)


class _RowReader:
    """Carries out the read plan of slices, in calls that threads share."""

    def __init__(self, planner: ReadPlanner, source: RangeReader, names: Sequence[str]) -> None:
        self._planner, self._source = planner, source
        self._names = names
        """Files by number of the shard."""

    def reads(self, piece: Slice, features_BTD: Features) -> list[Callable[[], _Read]]:
        """Return the calls that fill a batch with the windows of a slice."""
        if not self._planner.is_contiguous:
            calls = self._planner.calls(len(piece.movie))
            return [partial(self._gather, piece, features_BTD, call) for call in calls]
        reads = self._planner.windows(piece)
        names = [self._names[shard] for shard in reads.shard_B.tolist()]
        ranges = list(map(Range, names, reads.offset_B.tolist()))
        rooms, tails = _places(reads, features_BTD)
        return [
            partial(_read_windows, self._source, ranges[call], rooms[call], tails[call])
            for call in reads.calls
        ]

    def _gather(self, piece: Slice, features_BTD: Features, call: slice) -> _Read:
        """Read windows whose rows are not neighbours, or are means over shots."""
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
        # Summed in float32: float16 would overflow, and lose the rows of a long shot.
        sums_SD = np.add.reduceat(frames_ND, firsts_S, axis=0, dtype=np.float32)
        window_TD[: len(sizes_S)] = sums_SD / sizes_S[:, None]
        window_TD[len(sizes_S) :] = 0
        return done

    def _read_rows(self, read: GatheredRead, rows_ND: Features) -> _Read:
        """Read the ranges of a window and pick its rows, in any order, into ``rows_ND``."""
        n_rows = int(read.first_R[-1] + read.end_R[-1] - read.begin_R[-1])
        in_place = read.is_one_run  # the range is the window itself: no copy
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


def _places(
    reads: WindowReads, features_BTD: Features
) -> tuple[list[memoryview], list[memoryview]]:
    """Return the memory of each range's rows in a batch, and of the padding rows after them."""
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
    rooms: Sequence[memoryview],
    tails: Sequence[memoryview],
) -> _Read:
    # A reused buffer holds rows of an earlier batch: padding rows are zeroed each time.
    for tail in tails:
        if len(tail):
            np.frombuffer(tail, np.uint8).fill(0)
    source.read_into(ranges, rooms)
    return _Read(len(ranges), sum(map(len, rooms)))


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


def _work(tasks: SimpleQueue[_Task | None], closing: threading.Event) -> None:
    while (task := tasks.get()) is not None:
        # Replied to even when closing: a consumer that still waits must not wait forever.
        reply: Reply = _Read(0, 0)
        if not closing.is_set():
            try:
                reply = task.read()
            except BaseException as caught:  # noqa: BLE001  # the consumer raises it
                reply = caught
        task.replies.put(reply)
        # While this thread waits for the next task it must not hold this one's batch.
        del task, reply


def _stop(
    tasks: SimpleQueue[_Task | None],
    closing: threading.Event,
    workers: Sequence[threading.Thread],
    process: int,
) -> None:
    if os.getpid() != process:
        return  # a forked child has a copy of the lists, but none of the threads
    closing.set()
    for _ in workers:
        tasks.put(None)
    join_soon(workers)


def join_soon(threads: Iterable[threading.Thread]) -> None:
    """Wait for threads that are about to end; leave those alone whose read takes longer."""
    limit = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, limit - time.monotonic()))
