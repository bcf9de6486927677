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
from training.stream.plan import Cut, IntArray, Slice, covering_runs

if TYPE_CHECKING:
    from sharding.features import FeatureSet
    from sharding.storage.base import Source
    from training.stream.shots import Shots

ROW_TYPE = np.dtype("<f2")
"""Type of a feature on disk and in a batch."""

Features = NDArray[np.float16]

PATIENCE_S = 1.0
"""How long closing waits for a read that has begun."""


class Lent(NamedTuple):
    """A batch buffer while it is filled."""

    features_BTD: Features
    """What the batch holds."""

    owner: object
    """What the memory belongs to; the buffer comes back when this and all its views are gone."""


class Buffers(Protocol):
    """Where the memory of batches comes from."""

    def take(self, shape: tuple[int, int, int]) -> Lent:
        """Return memory of this shape that nobody holds; its content is anything."""

    def clear(self) -> None:
        """Let go of what is free."""


class Ring:
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

    def take(self, shape: tuple[int, int, int]) -> Lent:
        """Return a buffer that nobody holds; its content is whatever was there before."""
        n_bytes = shape[0] * shape[1] * shape[2] * ROW_TYPE.itemsize
        with self._lock:
            memory = self._find(n_bytes)
        # A fresh owner for each loan. Its base is a memoryview, so numpy does not look through it:
        # every view and every tensor made of it keeps this very object alive.
        owner = np.frombuffer(memory.data[:n_bytes], ROW_TYPE)
        weakref.finalize(owner, self._give_back, memory).atexit = False
        return Lent(owner.reshape(shape), owner)

    def clear(self) -> None:
        """Let go of the free buffers."""
        with self._lock:
            while self._free:
                self._drop(self._free.popleft())

    def _find(self, n_bytes: int) -> NDArray[np.uint8]:
        """Return a free buffer that is large enough; or a new one, in place of one too small."""
        for _ in range(len(self._free)):
            memory = self._free.popleft()
            if len(memory) >= n_bytes:
                return memory
            self._free.append(memory)
        if self._free:
            self._drop(self._free.popleft())
        self.made += 1
        self._held_bytes += n_bytes
        return np.empty(n_bytes, np.uint8)

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
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


class Fetched(NamedTuple):
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

    fetched: Fetched
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


class Fetcher:
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
        source: Source,
        buffers: Buffers,
        *,
        cut: Cut,
        threads: int,
        stats: ReadStats,
        shots: Shots | None = None,
        ahead_bytes: int = 2**63,
    ) -> None:
        self._rows = _Rows(features, source, cut, shots)
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

    def read_ahead(self, pieces: Iterable[Slice], *, prefetch: int) -> Iterator[Fetched]:
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
        frames = self._cut.frames
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
        return _Pending(Fetched(piece, *lent), len(reads), replies)


class _Rows:
    """Where windows lie, and how they are read."""

    def __init__(self, features: FeatureSet, source: Source, cut: Cut, shots: Shots | None) -> None:
        self._index, self._source = features.index, source
        self._cut, self._shots = cut, shots
        self._row_bytes = features.dim * ROW_TYPE.itemsize
        self._names = [shard.name for shard in features.manifest.shards]

    def reads(self, piece: Slice, features_BTD: Features) -> list[Callable[[], _Read]]:
        """Return what reads the windows of a slice into a batch, some at a time."""
        size, n_windows = self._source.ranges_a_call, len(piece.movie)
        firsts = range(0, n_windows, size)
        if self._shots is not None or not self._cut.contiguous:
            chosen = (range(first, min(first + size, n_windows)) for first in firsts)
            return [partial(self._gather, piece, features_BTD, some) for some in chosen]
        ranges, rooms, tails = self._places(piece, features_BTD)
        if self._source.readers is None:
            together = [slice(first, first + size) for first in firsts]
        else:
            near = sorted(range(n_windows), key=lambda n: (ranges[n].name, ranges[n].offset))
            ranges = [ranges[number] for number in near]
            rooms, tails = [rooms[number] for number in near], [tails[number] for number in near]
            together = neighbours(ranges, list(map(len, rooms)), self._source.near_bytes)
        return [
            partial(_read_windows, self._source, ranges[some], rooms[some], tails[some])
            for some in together
        ]

    def _places(
        self, piece: Slice, features_BTD: Features
    ) -> tuple[list[Range], list[memoryview], list[memoryview]]:
        """Return each window's range, the place of its rows, and what lies behind them there."""
        view, size = _bytes_of(features_BTD), features_BTD[0].nbytes
        offset_B = self._index.offset[piece.movie].astype(np.int64) + piece.start * self._row_bytes
        names = [self._names[number] for number in self._index.shard[piece.movie].tolist()]
        ends = (np.arange(len(names)) * size + piece.length * self._row_bytes).tolist()
        edges = range(0, (len(names) + 1) * size, size)
        return (
            list(map(Range, names, offset_B.tolist())),
            [view[first:end] for first, end in zip(edges, ends, strict=False)],
            [view[end:last] for end, last in zip(ends, edges[1:], strict=True)],
        )

    def _gather(self, piece: Slice, features_BTD: Features, windows: range) -> _Read:
        """Read windows whose rows do not lie side by side, or are means over shots."""
        done = [
            self._gather_one(
                int(piece.movie[window]),
                int(piece.visit[window]),
                int(piece.start[window]),
                features_BTD[window],
            )
            for window in windows
        ]
        return _Read(sum(each.ranges for each in done), sum(each.n_bytes for each in done))

    def _gather_one(self, movie: int, visit: int, start: int, room_TD: Features) -> _Read:
        if self._shots is None:
            n_rows = int(self._index.rows[movie])
            rows_N = self._cut.rows(movie, visit, start, n_rows)
            room_TD[len(rows_N) :] = 0
            return self._read_rows(movie, rows_N, room_TD[: len(rows_N)])
        shots_N = self._cut.rows(movie, visit, start, int(self._shots.count_M[movie]))
        rows_N, sizes = self._shots.rows(movie, shots_N)
        frames_ND = np.empty((len(rows_N), room_TD.shape[1]), ROW_TYPE)
        done = self._read_rows(movie, rows_N, frames_ND)
        firsts = np.cumsum(sizes) - sizes
        sums_ND = np.add.reduceat(frames_ND, firsts, axis=0, dtype=np.float32)
        room_TD[: len(shots_N)] = sums_ND / sizes[:, None]
        room_TD[len(shots_N) :] = 0
        return done

    def _read_rows(self, movie: int, rows_N: IntArray, room_ND: Features) -> _Read:
        """Read rows of a movie, in any order, by the ranges that cover them."""
        near_rows = 1 + self._source.near_bytes // self._row_bytes
        begins, ends = covering_runs(rows_N, near_rows)
        sizes = ends - begins
        places = np.cumsum(sizes) - sizes
        straight = len(begins) == 1 and bool((np.diff(rows_N) == 1).all())
        rows_RD = room_ND if straight else np.empty((int(sizes.sum()), room_ND.shape[1]), ROW_TYPE)
        name = self._names[int(self._index.shard[movie])]
        first = int(self._index.offset[movie])
        view = _bytes_of(rows_RD)
        edges = (np.append(places, len(rows_RD)) * self._row_bytes).tolist()
        self._source.read_into(
            [Range(name, first + begin * self._row_bytes) for begin in begins.tolist()],
            [view[edge:end] for edge, end in pairwise(edges)],
        )
        if not straight:
            run_N = np.searchsorted(begins, rows_N, side="right") - 1
            np.take(rows_RD, rows_N - begins[run_N] + places[run_N], axis=0, out=room_ND)
        return _Read(len(begins), len(view))


def _bytes_of(features: Features) -> memoryview:
    return features.reshape(-1).view(np.uint8).data


def neighbours(ranges: Sequence[Range], sizes: Sequence[int], near_bytes: int) -> list[slice]:
    """Group ranges, in order of their places, that ``near_bytes`` of a file hold together."""
    edges, name, limit = [0], ranges[0].name, ranges[0].offset + near_bytes
    for number, (part, size) in enumerate(zip(ranges, sizes, strict=True)):
        if number and (part.name != name or part.offset + size > limit):
            edges.append(number)
            name, limit = part.name, part.offset + near_bytes
    return [slice(*edge) for edge in pairwise([*edges, len(ranges)])]


def _read_windows(
    source: Source,
    ranges: Sequence[Range],
    rooms: Sequence[memoryview],
    tails: Sequence[memoryview],
) -> _Read:
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
        return
    closing.set()
    for _ in workers:
        tasks.put(None)
    join_soon(workers)


def join_soon(threads: Iterable[threading.Thread]) -> None:
    """Wait for threads that are about to end; leave those alone whose read takes longer."""
    limit = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, limit - time.monotonic()))
