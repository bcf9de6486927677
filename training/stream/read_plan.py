"""The byte ranges that fill a slice of the plan, grouped into read calls.

Pure: the reader executes this plan and the preview sums it up, so the two cannot disagree. Windows
of consecutive rows are planned for a complete slice at once. Other windows (a stride, a choice,
permuted rows, means of shots) are planned one by one, so that the reading threads share the work.

Axes: B = windows of a slice, R = ranges of a window, N = rows of a window, S = shots of a window,
Q = requests, M = movies of the index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from training.stream.epoch_plan import IntArray, Slice, WindowSpec, covering_runs

if TYPE_CHECKING:
    from sharding.features import FeatureSet
    from sharding.format.index import FeatureIndex
    from training.stream.shots import Shots

ROW_TYPE = np.dtype("<f2")
"""Data type of features on disk and in a batch."""


class ReadCosts(Protocol):
    """Properties of a ``RangeReader`` that determine how it is read."""

    @property
    def near_bytes(self) -> int:
        """Largest gap between two ranges that is cheaper to read than a separate range."""

    @property
    def ranges_a_call(self) -> int:
        """Recommended number of ranges per call, if they are not neighbours."""

    @property
    def readers(self) -> int | None:
        """Recommended number of concurrent reading threads; None: a few, as for a disk."""


class WindowReads(NamedTuple):
    """One range per window of a slice, in reading order."""

    window_B: IntArray
    """int64 ``[B]``, window of the slice that each range fills."""

    shard_B: NDArray[np.integer[Any]]
    """``[B]`` shard number."""

    offset_B: IntArray
    """int64 ``[B]``, first byte within the shard."""

    n_bytes_B: IntArray
    """int64 ``[B]``."""

    calls: Sequence[slice]
    """Ranges of each call."""


class GatheredRead(NamedTuple):
    """One window whose rows are selected from the ranges that cover them."""

    shard: int
    offset: int
    """First byte of the movie within the shard."""

    row_N: IntArray
    """int64 ``[N]``, rows of the movie in the order of the window; with means, shot by shot."""

    begin_R: IntArray
    """int64 ``[R]``, first row of each range, ascending."""

    end_R: IntArray
    """int64 ``[R]``, one past its last row."""

    first_R: IntArray
    """int64 ``[R]``, position of its first row among the rows of all ranges."""

    shot_rows_S: IntArray | None
    """int64 ``[S]``, rows per shot whose mean is one row of the window; None: no means."""

    @property
    def is_one_run(self) -> bool:
        """Whether the rows are consecutive and ascending, so that no selection is needed."""
        return len(self.begin_R) == 1 and bool((np.diff(self.row_N) == 1).all())

    @property
    def place_N(self) -> IntArray:  # noqa: N802  # axes, as in the fields
        """int64 ``[N]``, position of each row among the rows of all ranges."""
        run_N = np.searchsorted(self.begin_R, self.row_N, side="right") - 1
        place_N: IntArray = self.row_N - self.begin_R[run_N] + self.first_R[run_N]
        return place_N


class Requests(NamedTuple):
    """Requests to the source for a slice, before the source splits long ones."""

    shard_Q: NDArray[np.integer[Any]]
    """``[Q]`` shard number."""

    n_bytes_Q: IntArray
    """int64 ``[Q]``."""

    ranges_Q: IntArray
    """int64 ``[Q]``, number of ranges that each request serves."""


@dataclass(frozen=True, eq=False)
class ReadPlanner:
    """Planner of the reads of slices; thread-safe."""

    index: FeatureIndex
    spec: WindowSpec
    """Rows of a window."""

    shots: Shots | None
    """Shots of the movies, if a row is the mean of a shot."""

    row_bytes: int
    near_bytes: int
    """Largest gap between two ranges that is cheaper to read than a separate range."""

    ranges_per_call: int
    joins_neighbours: bool
    """Whether the source reads nearby ranges of a call in one request, as object stores do."""

    @classmethod
    def of(
        cls, features: FeatureSet, source: ReadCosts, spec: WindowSpec, shots: Shots | None
    ) -> Self:
        """Return the planner of a feature set that is read through ``source``."""
        return cls(
            index=features.index,
            spec=spec,
            shots=shots,
            row_bytes=features.dim * ROW_TYPE.itemsize,
            near_bytes=source.near_bytes,
            ranges_per_call=source.ranges_a_call,
            joins_neighbours=source.readers is not None,
        )

    @property
    def is_contiguous(self) -> bool:
        """Whether each window is one range, planned by ``windows``; otherwise by ``gathered``."""
        return self.spec.contiguous and self.shots is None

    def places(self, piece: Slice) -> tuple[NDArray[np.integer[Any]], IntArray, IntArray]:
        """Return shard, first byte and number of bytes of each window, which is one range."""
        shard_B = self.index.shard[piece.movie]
        offset_B = self.index.offset[piece.movie].astype(np.int64) + piece.start * self.row_bytes
        return shard_B, offset_B, piece.length * self.row_bytes

    def windows(self, piece: Slice) -> WindowReads:
        """Plan the windows of a slice, each as one range."""
        shard_B, offset_B, n_bytes_B = self.places(piece)
        n_windows = len(piece.movie)
        if not self.joins_neighbours:
            window_B = np.arange(n_windows)
            return WindowReads(window_B, shard_B, offset_B, n_bytes_B, self.calls(n_windows))
        # Sorted by shard and offset: ranges that one request can serve become neighbours.
        window_B = np.lexsort((offset_B, shard_B))
        shard_B, offset_B = shard_B[window_B], offset_B[window_B]
        n_bytes_B = n_bytes_B[window_B]
        calls = neighbours(shard_B, offset_B, n_bytes_B, self.near_bytes)
        return WindowReads(window_B, shard_B, offset_B, n_bytes_B, calls)

    def calls(self, n_windows: int) -> list[slice]:
        """Divide the windows of a slice into calls of ``ranges_per_call``, in order."""
        firsts = range(0, n_windows, self.ranges_per_call)
        return [slice(first, min(first + self.ranges_per_call, n_windows)) for first in firsts]

    def gathered(self, piece: Slice, window: int) -> GatheredRead:
        """Plan one window of a slice as the ranges that cover its rows."""
        movie, window_index = int(piece.movie[window]), int(piece.window_index[window])
        start = int(piece.start[window])
        shot_rows_S: IntArray | None = None
        if self.shots is None:
            row_N = self.spec.rows(movie, window_index, start, int(self.index.rows[movie]))
        else:
            # The spec selects shots; the rows to read are those of the selected shots.
            shot_S = self.spec.rows(movie, window_index, start, int(self.shots.count_M[movie]))
            row_N, shot_rows_S = self.shots.rows(movie, shot_S)
        begin_R, end_R = covering_runs(row_N, 1 + self.near_bytes // self.row_bytes)
        n_rows_R = end_R - begin_R
        return GatheredRead(
            shard=int(self.index.shard[movie]),
            offset=int(self.index.offset[movie]),
            row_N=row_N,
            begin_R=begin_R,
            end_R=end_R,
            first_R=np.cumsum(n_rows_R) - n_rows_R,
            shot_rows_S=shot_rows_S,
        )

    def requests(self, piece: Slice) -> Requests:
        """Return the requests to the source for a slice, including padding."""
        if not self.is_contiguous:
            return self._gathered_requests(self.gathered(piece, k) for k in range(len(piece.movie)))
        reads = self.windows(piece)
        if not self.joins_neighbours:
            return Requests(reads.shard_B, reads.n_bytes_B, np.ones(len(piece.movie), np.int64))
        first_Q = np.array([call.start for call in reads.calls], np.int64)
        # A joined request extends from the first to the last byte of its ranges, gaps included.
        begin_Q = np.minimum.reduceat(reads.offset_B, first_Q)
        end_Q = np.maximum.reduceat(reads.offset_B + reads.n_bytes_B, first_Q)
        ranges_Q = np.diff(first_Q, append=len(piece.movie))
        return Requests(reads.shard_B[first_Q], end_Q - begin_Q, ranges_Q)

    def _gathered_requests(self, reads: Iterable[GatheredRead]) -> Requests:
        # Each range is a separate request: nearby rows are merged into one range already.
        shards, sizes = list[int](), list[IntArray]()
        for read in reads:
            shards += [read.shard] * len(read.begin_R)
            sizes.append((read.end_R - read.begin_R) * self.row_bytes)
        return Requests(np.array(shards), np.concatenate(sizes), np.ones(len(shards), np.int64))


def neighbours(
    shard_R: NDArray[np.integer[Any]], offset_R: IntArray, n_bytes_R: IntArray, near_bytes: int
) -> list[slice]:
    """Group neighbouring ranges of a shard into spans of at most ``near_bytes``.

    Args:
        shard_R: ``[R]`` shard of each range, ascending, at least one.
        offset_R: int64 ``[R]``, first byte, ascending within a shard.
        n_bytes_R: int64 ``[R]``.
        near_bytes: Maximum length in bytes of a group of several ranges, from first to last byte.
    """
    edges, current, limit = [0], -1, 0
    # Plain integers: iterating over numpy scalars would be several times slower.
    columns = (shard_R.tolist(), offset_R.tolist(), n_bytes_R.tolist())
    for number, (shard, offset, n_bytes) in enumerate(zip(*columns, strict=True)):
        if shard != current or offset + n_bytes > limit:
            edges.append(number)
            current, limit = shard, offset + near_bytes
    return [slice(*edge) for edge in pairwise([*edges[1:], len(shard_R)])]
