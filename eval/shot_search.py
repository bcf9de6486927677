"""The shots of a feature set that are most similar to a vector, over all films.

Rows are read once, in pieces of a few megabytes, several of them in flight. Memory depends neither
on the size of the set nor on the length of a film.

M = movies of the index, R = rows of a piece, D = feature size
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from configs.runtime.progress import progress
from sharding.features import FeatureSet, read_shots
from sharding.storage.base import Range

PIECE_BYTES = 4 * 1024**2
"""Bytes of the rows of a piece: the longest range that an object store reads by one request."""

_WIDE_ROWS = 512
"""Rows that are compared at once, few enough for the caches of a core."""

_READERS = 2
"""Threads that read and compare, unless the storage recommends a number."""


@dataclass(frozen=True)
class Hit:
    """A shot, by its most similar row."""

    movie: int
    """Position of the movie in the index."""

    shot: int | None
    """None if the set does not contain shots: then each row counts as one."""

    row: int
    """Row within the movie, from 0."""

    similarity: float
    """Cosine of the angle between the vector and the row, from -1 to 1."""


@dataclass(frozen=True)
class Found:
    """Result of a search."""

    hits: tuple[Hit, ...]
    """The most similar shot first; of equal ones, the first in the order of index and rows."""

    rows: int
    """Rows of the set."""

    skipped: int
    """Rows without a similarity: zero rows, and rows with NaN or infinite numbers."""


ReadShots = Callable[[list[int]], Sequence[NDArray[np.int32]]]
"""Returns the shot of each row of the given movies; -1 if unknown."""


class Span(NamedTuple):
    """Consecutive rows of one movie."""

    movie: int
    first: int
    n_rows: int


def search(features: FeatureSet, vector_D: NDArray[np.float32], top: int) -> Found:
    """Return the ``top`` shots whose best row is most similar to a vector.

    Args:
        features: The feature set.
        vector_D: float32 ``[D]``, L2-normalised.
        top: Maximum number of shots.

    Raises:
        DataError: a shard is missing or truncated.
    """
    rows_M = features.index.rows.astype(np.int64)
    best, skipped = BestShots(top), 0
    with progress(int(rows_M.sum()), label="search", unit="rows") as bar:
        for piece in _scored_pieces(features, vector_D, rows_M, best):
            best.add(piece.hits)
            skipped += piece.skipped
            bar.advance(piece.n_rows)
    return Found(tuple(best.hits), int(rows_M.sum()), skipped)


def plan_pieces(rows_M: NDArray[np.int64], piece_rows: int) -> Iterator[list[Span]]:
    """Yield all rows of all movies in order, in pieces of ``piece_rows``; the last may be shorter.

    Args:
        rows_M: Rows of each movie, in the order of the index.
        piece_rows: Rows of a piece.
    """
    piece, free = list[Span](), piece_rows
    for movie, n_rows in enumerate(rows_M.tolist()):
        first = 0
        while first < n_rows:
            count = min(free, n_rows - first)
            piece.append(Span(movie, first, count))
            first, free = first + count, free - count
            if not free:
                yield piece
                piece, free = [], piece_rows
    if piece:
        yield piece


def similarities(
    rows_RD: NDArray[np.float16], vector_D: NDArray[np.float32], wide_RD: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the cosine of each row, float32 ``[R]``; -inf for rows that have none.

    Equal rows have equal cosines, wherever they are stored.

    Args:
        rows_RD: The rows.
        vector_D: float32 ``[D]``, L2-normalised.
        wide_RD: Scratch memory for some rows in float32, overwritten.
    """
    n_rows, step = len(rows_RD), len(wide_RD)
    product_R, square_R = np.empty((2, n_rows), np.float32)
    # With PyTorch, as NumPy converts float16 twenty times slower.
    half, wide = torch.from_numpy(rows_RD), torch.from_numpy(wide_RD)
    for begin in range(0, n_rows, step):
        end = min(begin + step, n_rows)
        wide[: end - begin].copy_(half[begin:end])
        block_RD = wide_RD[: end - begin]
        # One product per row: those of a matrix depend on the place of a row, in the last bit.
        np.vecdot(block_RD, vector_D, out=product_R[begin:end])
        np.vecdot(block_RD, block_RD, out=square_R[begin:end])
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine_R = np.clip(product_R / np.sqrt(square_R), -1, 1)
    return np.where(np.isfinite(cosine_R), cosine_R, np.float32(-np.inf))


class BestShots:
    """The most similar shots of the pieces so far.

    Args:
        top: Maximum number of shots.
    """

    def __init__(self, top: int) -> None:
        self.hits: list[Hit] = []
        self.top = top

    @property
    def floor(self) -> float:
        """Similarity that rows of later pieces must exceed; an equal row comes after all hits."""
        return self.hits[-1].similarity if len(self.hits) == self.top else -np.inf

    def add(self, hits: list[Hit]) -> None:
        """Add the hits of the next piece."""
        if hits:
            self.hits = _distinct(sorted([*self.hits, *hits], key=_order), self.top)


def hits_of(
    similarity_R: NDArray[np.float32],
    spans: list[Span],
    read_shots: ReadShots,
    *,
    floor: float,
    top: int,
) -> list[Hit]:
    """Return the best row of each shot of a piece, the most similar first, at most ``top``.

    Args:
        similarity_R: Similarity of the rows of all spans; -inf is never a hit.
        spans: The piece.
        read_shots: Called with the movies of possible hits.
        floor: Similarity that a hit exceeds.
        top: Maximum number of hits.
    """
    rows = np.flatnonzero(similarity_R > floor)
    if not len(rows):
        return []
    descending = rows[np.argsort(-similarity_R[rows], kind="stable")].tolist()
    ends = np.cumsum([span.n_rows for span in spans]).tolist()
    chosen = np.unique(np.searchsorted(ends, rows, side="right")).tolist()
    shots = dict(zip(chosen, read_shots([spans[span].movie for span in chosen]), strict=True))

    def hit(row: int) -> Hit:
        span = bisect_right(ends, row)
        movie, first, n_rows = spans[span]
        row_of_movie = first + row - (ends[span] - n_rows)
        shot = int(shots[span][row_of_movie])
        similarity = float(similarity_R[row])
        return Hit(movie, shot if shot >= 0 else None, row_of_movie, similarity)

    return _distinct(map(hit, descending), top)


def _order(hit: Hit) -> tuple[float, int, int]:
    return -hit.similarity, hit.movie, hit.row


def _distinct(hits: Iterable[Hit], top: int) -> list[Hit]:
    """Return the first hit of each shot, at most ``top``."""
    first: dict[tuple[int, int], Hit] = {}
    for hit in hits:
        # Shots count from 0, so rows without a shot get numbers below.
        first.setdefault((hit.movie, -1 - hit.row if hit.shot is None else hit.shot), hit)
        if len(first) == top:
            break
    return list(first.values())


class _Scored(NamedTuple):
    """Result of a piece."""

    hits: list[Hit]
    n_rows: int
    skipped: int


def _scored_pieces(
    features: FeatureSet,
    vector_D: NDArray[np.float32],
    rows_M: NDArray[np.int64],
    best: BestShots,
) -> Iterator[_Scored]:
    """Yield the results of all pieces in order, while threads read and compare the next ones."""
    piece_rows = max(1, PIECE_BYTES // (2 * features.dim))
    readers = features.storage.readers or _READERS
    workers = SimpleQueue[_Worker]()
    for _ in range(readers):
        workers.put(_Worker(features, vector_D, piece_rows))

    def score(spans: list[Span]) -> _Scored:
        worker = workers.get()
        try:
            return worker.score(spans, best)
        finally:
            workers.put(worker)

    pending: deque[Future[_Scored]] = deque()
    with _one_thread_per_operation(), ThreadPoolExecutor(readers, "search") as pool:
        try:
            for spans in plan_pieces(rows_M, piece_rows):
                pending.append(pool.submit(score, spans))
                if len(pending) > 2 * readers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for piece in pending:  # after an error: each could wait for storage.timeout
                piece.cancel()


class _Worker:
    """Memory of a thread that reads and compares pieces; fresh memory would cost page faults."""

    def __init__(
        self, features: FeatureSet, vector_D: NDArray[np.float32], piece_rows: int
    ) -> None:
        self._features, self._vector_D = features, vector_D
        self._rows_RD = np.empty((piece_rows, features.dim), np.float16)
        self._wide_RD = np.empty((min(piece_rows, _WIDE_ROWS), features.dim), np.float32)

    def score(self, spans: list[Span], best: BestShots) -> _Scored:
        similarity_R = similarities(self._read(spans), self._vector_D, self._wide_RD)
        # Shots are read only where a row may be a hit. The floor is that of earlier pieces.
        hits = hits_of(similarity_R, spans, self._read_shots, floor=best.floor, top=best.top)
        return _Scored(hits, len(similarity_R), int(np.isneginf(similarity_R).sum()))

    def _read(self, spans: list[Span]) -> NDArray[np.float16]:
        index, row_bytes = self._features.index, 2 * self._features.dim
        edges = np.cumsum([0, *(span.n_rows for span in spans)]).tolist()
        rows_RD = self._rows_RD[: edges[-1]]
        ranges = [
            Range(self._features.shard_file(movie), int(index.offset[movie]) + first * row_bytes)
            for movie, first, _ in spans
        ]
        buffers = [
            rows_RD[begin:end].reshape(-1).view(np.uint8).data for begin, end in pairwise(edges)
        ]
        self._features.storage.read_into(ranges, buffers)
        return rows_RD

    def _read_shots(self, movies: list[int]) -> list[NDArray[np.int32]]:
        return list(read_shots(self._features, movies))


@contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Disable PyTorch's own threads, which would compete with those that compare pieces."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
