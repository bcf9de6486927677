"""The plan of an epoch: its windows, their order, the global batches and the slices of each rank.

A window is the part of a movie that is read at once: consecutive rows, every k-th row, a random
choice of rows, or the complete movie. If rows represent shots, shots are planned like frames.

Pure numpy, without I/O or clock: the same arguments give the same plan on every machine.

All random numbers are raw words of the counter-based generator Philox (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"). numpy guarantees that these words are stable across
versions, but not so the methods of ``Generator``. The key is the pair (seed, epoch), not their sum:
with ``seed + epoch`` the second epoch of seed 0 would equal the first epoch of seed 1. The counter
identifies the use of a word: its last limb is the purpose, the limb before it the window index k,
and the word number is the movie. A word therefore depends on (seed, epoch, movie, k) only. (For a
choice of rows, the movie is in the counter and the word number is the row.) Neither the other
movies of a split nor the reading order can change it, and an epoch is still drawn in one call.

Axes: M = movies of the feature index, N = windows of the plan (or movies), K = windows per movie,
B = windows of a slice.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError

VERSION = 1
"""Version of the order, part of the plan's digest. Changes to it are listed in the CHANGELOG."""

IntArray = NDArray[np.int64]
Words = NDArray[np.uint64]

Sampling = Literal["random_window", "uniform_windows", "full_movie", "random_frames"]
Unit = Literal["frame", "shot"]

# Purposes: the last limb of the counter.
_ORDER, _START, _SHARDS, _FRAMES, _CHOICE, _BATCHES, _PARTNER, _PARTNER_START = range(8)


@dataclass(frozen=True)
class WindowSpec:
    """Rows of a movie that form a window."""

    window: int | None
    """Maximum number of rows; None: all rows."""

    stride: int = 1
    """Every k-th row."""

    choice: tuple[int, int] | None = None
    """(seed, epoch) of a random choice of ``window`` rows, in ascending order."""

    shuffle_seed: int | None = None
    """Seed of a permutation of the movie's rows by (seed, movie), before windows are cut."""

    @property
    def contiguous(self) -> bool:
        """Whether a window consists of consecutive rows in ascending order."""
        return self.stride == 1 and self.choice is None and self.shuffle_seed is None

    def max_start(self, rows: NDArray[np.integer[Any]]) -> IntArray:
        """Return the last possible start of a window in each movie, int64 ``[N]``.

        Args:
            rows: ``[N]`` rows of each movie.
        """
        n_rows = rows.astype(np.int64)
        if self.choice is not None:
            return np.zeros_like(n_rows)  # rows are chosen from the complete movie
        # A movie that fits into one window starts at any phase of the stride, but nowhere else.
        phases: IntArray = np.maximum(np.minimum(n_rows, self.stride) - 1, 0)
        if self.window is None:
            return phases
        span = (self.window - 1) * self.stride + 1
        return np.where(n_rows >= span, n_rows - span, phases)

    def length(self, rows: NDArray[np.integer[Any]], start: IntArray) -> IntArray:
        """Return the number of rows of each window, int64 ``[N]``, at least 1.

        Args:
            rows: ``[N]`` rows of each window's movie.
            start: int64 ``[N]``, first row of each window.
        """
        n_rows = -(-(rows.astype(np.int64) - start) // self.stride)
        return n_rows if self.window is None else np.minimum(n_rows, self.window)

    def rows(self, movie: int, window_index: int, start: int, n_rows: int) -> IntArray:
        """Return the rows of one window in reading order, int64 ``[length]``.

        Args:
            movie: Position in the feature index.
            window_index: k, the number of the window within its movie.
            start: First row.
            n_rows: Rows of the movie.
        """
        if self.choice is None:
            chosen = np.arange(start, n_rows, self.stride)[: self.window]
        else:
            words = _words(*self.choice, _CHOICE, window_index, n_rows, movie)
            chosen = np.sort(sort_order(words)[: self.window])
        if self.shuffle_seed is None:
            return chosen
        return frame_order(self.shuffle_seed, movie, n_rows)[chosen]


@dataclass(frozen=True)
class SamplingOrder:
    """Settings that determine the order of training, and no others.

    World size and accumulation are deliberately absent: the global batches do not depend on them.

    Raises:
        ConfigError: a field is out of range.
    """

    seed: int
    """0 to 2**64 - 1."""

    window: int
    """Rows per window."""

    windows_per_movie: int
    """Windows per movie and epoch."""

    global_batch: int
    """Windows per optimizer step."""

    drop_last: bool = False
    """Drop a short last global batch."""

    shuffle_block_shards: int = 0
    """0: one permutation of all windows. k: permute the shards, group them by k, and permute the
    windows of each group."""

    shuffle_frames: bool = False
    """Permute the rows of each movie before windows are cut."""

    sampling: Sampling = "random_window"
    """Rows of a movie that are read, as in ``stream.sampling``."""

    stride: int = 1
    """Every k-th row."""

    unit: Unit = "frame"
    """What a row represents: a frame, or the mean of a shot."""

    bucket_batches: int = 1
    """Global batches that are sorted by length together; only with ``full_movie``."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"stream.seed: got {self.seed}, want 0 to 2**64 - 1")
        for name in ("window", "windows_per_movie", "global_batch", "stride", "bucket_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stream.{name}: got {getattr(self, name)}, want at least 1")
        if self.shuffle_block_shards < 0:
            raise ConfigError(
                f"stream.shuffle_block_shards: got {self.shuffle_block_shards}, want 0 or more"
            )
        if self.stride > 1 and (self.sampling == "random_frames" or self.unit == "shot"):
            other = "sampling random_frames" if self.sampling == "random_frames" else "unit shot"
            raise ConfigError(f"stream.stride: got {self.stride} with stream.{other}, want 1")

    def window_spec(self, epoch: int) -> WindowSpec:
        """Return the rows of windows in an epoch."""
        return WindowSpec(
            window=None if self.sampling == "full_movie" else self.window,
            stride=self.stride,
            choice=(self.seed, epoch) if self.sampling == "random_frames" else None,
            shuffle_seed=self.seed if self.shuffle_frames else None,
        )

    def n_windows(self, rows: NDArray[np.integer[Any]]) -> int:
        """Return the number of windows of an epoch, including those of a short last batch.

        Args:
            rows: ``[N]`` rows of each movie of the epoch.
        """
        if self.sampling != "uniform_windows":
            return len(rows) * self.windows_per_movie
        return int(
            np.minimum(self.window_spec(0).max_start(rows) + 1, self.windows_per_movie).sum()
        )

    def digest(self, movies: IntArray) -> str:
        """Return the sha256 of the order applied to ``movies``, in hexadecimal.

        Args:
            movies: int64 ``[N]``, distinct positions in the feature index, in any order.
        """
        positions = hashlib.sha256(movie_set(movies).astype("<i8").tobytes()).hexdigest()
        fields: dict[str, Any] = {**asdict(self), "version": VERSION, "movies": positions}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class Slice(NamedTuple):
    """Windows of one rank in one micro-batch; all arrays are ``[B]``.

    Padding repeats the first window of the global batch with weight 0. It is a real window, so that
    a model never receives a sample without frames.
    """

    movie: IntArray
    """Positions in the feature index."""

    window_index: IntArray
    """k, the number of the window within its movie."""

    start: IntArray
    """First row of the window."""

    weight: NDArray[np.float32]
    """1, or 0 for padding."""

    length: IntArray
    """Rows of the window, at least 1."""

    global_weight: float
    """W: sum of the weights of the global batch, over all ranks and micro-batches."""


@dataclass(frozen=True)
class WindowPlan:
    """Windows in training order, divided into global batches."""

    spec: WindowSpec
    """Rows of a window."""

    movie: IntArray
    """``[N]`` positions in the feature index."""

    window_index: IntArray
    """``[N]`` k, the number of the window within its movie."""

    start: IntArray
    """``[N]`` first row of the window."""

    length: IntArray
    """``[N]`` rows of the window."""

    edges: IntArray
    """``[steps + 1]`` first window of each global batch, and the end of the last one."""

    capacity: IntArray
    """``[steps]`` windows of a full global batch; short batches are padded to it."""

    @property
    def steps(self) -> int:
        """Number of global batches."""
        return len(self.capacity)

    def slice(self, step: int, index: int, n_slices: int) -> Slice:
        """Return one of ``n_slices`` equal slices of global batch ``step``.

        Consecutive windows are distributed evenly: the counts of two slices differ by at most 1.
        All slices of a step have the same size B.

        Args:
            step: 0 to ``steps - 1``.
            index: 0 to ``n_slices - 1``: micro-batch x ranks + rank.
            n_slices: Ranks x micro-batches.
        """
        first, stop = self.edges[step : step + 2].tolist()
        # B follows from the capacity, so that a short batch has the same shape on every rank.
        n_windows = stop - first
        size = -(-int(self.capacity[step]) // n_slices)
        begin, end = (first + n_windows * edge // n_slices for edge in (index, index + 1))
        if end - begin == size:  # nearly always
            own = slice(begin, end)
            return Slice(
                self.movie[own].copy(),
                self.window_index[own].copy(),
                self.start[own].copy(),
                np.ones(size, np.float32),
                self.length[own].copy(),
                float(n_windows),
            )
        chosen = np.full(size, first, np.int64)
        chosen[: end - begin] = np.arange(begin, end)
        weight = (np.arange(size) < end - begin).astype(np.float32)
        return Slice(
            self.movie[chosen],
            self.window_index[chosen],
            self.start[chosen],
            weight,
            self.length[chosen],
            float(n_windows),
        )


def count_steps(n_windows: int, global_batch: int, *, drop_last: bool) -> int:
    """Return the number of global batches of ``n_windows`` windows."""
    return n_windows // global_batch if drop_last else -(-n_windows // global_batch)


def slice_size(n_windows: int, global_batch: int, n_slices: int) -> int:
    """Return B, the size of each of ``n_slices`` slices: the same for every step and rank."""
    return -(-min(n_windows, global_batch) // n_slices)


def padding_share(n_windows: int, global_batch: int, n_slices: int, *, drop_last: bool) -> float:
    """Return the share of an epoch's windows that are padding, 0 to 1."""
    steps = count_steps(n_windows, global_batch, drop_last=drop_last)
    places = steps * n_slices * slice_size(n_windows, global_batch, n_slices)
    return 1 - min(n_windows, steps * global_batch) / places if places else 0.0


def movie_set(movies: IntArray) -> IntArray:
    """Return ``movies`` in ascending order, int64 ``[N]``.

    Args:
        movies: ``[N]`` positions in the feature index, in any order.

    Raises:
        ValueError: a position occurs twice, or is negative.
    """
    positions = np.asarray(movies, np.int64)
    # Positions are usually sorted already, and a check is cheaper than sorting a million of them.
    if not (positions[1:] > positions[:-1]).all():
        positions = np.sort(positions)
    if (positions[:1] < 0).any() or (positions[1:] == positions[:-1]).any():
        raise ValueError("movies: got a position twice or below 0, want distinct positions from 0")
    return positions


def plan_epoch(
    order: SamplingOrder,
    movies: IntArray,
    rows: NDArray[np.integer[Any]],
    *,
    epoch: int,
    shard: NDArray[np.integer[Any]] | None = None,
) -> WindowPlan:
    """Plan one epoch of training.

    Args:
        order: Settings of the order.
        movies: int64 ``[N]``, distinct positions in the feature index, in any order.
        rows: ``[M]`` rows of each movie of the index, below 2**32.
        epoch: From 0.
        shard: ``[M]`` shard of each movie of the index; required by ``order.shuffle_block_shards``.

    Returns:
        Each movie ``windows_per_movie`` times (with ``drop_last``, without the short last batch).

    Raises:
        ValueError: a position occurs twice, or ``shuffle_block_shards`` is set without ``shard``.
    """
    positions, spec = movie_set(movies), order.window_spec(epoch)
    n_rows, per_movie = rows[positions], order.windows_per_movie
    sequence = _permuted(order, epoch, positions, shard)
    max_start = spec.max_start(n_rows)
    if order.sampling == "uniform_windows":
        # Starts that coincide in a short movie count as one window.
        start, is_new = _spaced(max_start, per_movie)
        sequence = sequence[is_new[sequence]]
    else:
        words = _window_words(order, epoch, _START, positions)
        start = uniform_below(words, np.tile(max_start + 1, per_movie))
    steps = count_steps(len(sequence), order.global_batch, drop_last=order.drop_last)
    sequence = sequence[: steps * order.global_batch]  # shorter only with drop_last
    length = spec.length(np.tile(n_rows, per_movie), start)
    if order.sampling == "full_movie":
        sequence = _bucketed(order, epoch, sequence, length[sequence])
    # Window number = k x movies + place of the movie.
    window_index, place = np.divmod(sequence, max(len(positions), 1))
    # An epoch smaller than a global batch is one batch of its own size, not padded to a full one.
    n_full = min(order.n_windows(n_rows), order.global_batch)
    return WindowPlan(
        spec,
        positions[place],
        window_index,
        start[sequence],
        length[sequence],
        np.minimum(np.arange(steps + 1) * order.global_batch, len(sequence)),
        np.full(steps, n_full, np.int64),
    )


def _permuted(
    order: SamplingOrder, epoch: int, positions: IntArray, shard: NDArray[np.integer[Any]] | None
) -> IntArray:
    """Return all window numbers, int64 ``[K * N]``, permuted together or by group of shards."""
    sequence = sort_order(_window_words(order, epoch, _ORDER, positions))
    if not order.shuffle_block_shards:
        return sequence
    if shard is None:
        raise ValueError(
            "shuffle_block_shards: got no shard numbers, want one for each movie of the index"
        )
    group = np.tile(_groups(order, epoch, shard[positions]), order.windows_per_movie)
    # A stable sort keeps windows permuted within their group. numpy sorts 16-bit keys by radix.
    small = group.astype(np.min_scalar_type(int(group.max(initial=0))))
    return sequence[np.argsort(small[sequence], kind="stable")]


def plan_partners(
    plan: WindowPlan,
    order: SamplingOrder,
    movies: IntArray,
    rows: NDArray[np.integer[Any]],
    *,
    epoch: int,
) -> WindowPlan:
    """Plan a partner for each window: a window of another movie, to mix the two.

    Args:
        plan: Result of ``plan_epoch`` with the same arguments.
        order: Settings of the order.
        movies: int64 ``[N]``, distinct positions in the feature index to draw partners from.
        rows: ``[M]`` rows of each movie of the index.
        epoch: From 0.

    Returns:
        The partners, each at the position of its window, and so on the same rank for any world
        size. A partner depends on (seed, epoch, movie, k) and the set of movies.
    """
    positions = movie_set(movies)
    # Words are numbered by (k, movie): they do not depend on the window's place in the epoch.
    place = plan.window_index * len(positions) + np.searchsorted(positions, plan.movie)
    words = _window_words(order, epoch, _PARTNER, positions)[place]
    partner = positions[uniform_below(words, np.full(len(words), len(positions)))]
    words = _window_words(order, epoch, _PARTNER_START, positions)[place]
    start = uniform_below(words, plan.spec.max_start(rows[partner]) + 1)
    length = plan.spec.length(rows[partner], start)
    return replace(plan, movie=partner, start=start, length=length)


def plan_scoring(
    movies: IntArray,
    rows: NDArray[np.integer[Any]],
    *,
    spec: WindowSpec,
    windows: int,
    global_batch: int,
    n_slices: int = 1,
    max_rows: int = 2**16,
) -> WindowPlan:
    """Plan one pass over ``movies``: evenly spaced windows, or complete movies.

    Each movie is read once. It has ``windows`` windows from its first to its last row (a single
    window is in the middle), fewer if starts coincide, and one if it is no longer than a window.
    Windows are in order of position. Complete movies are in order of length, which saves padding;
    the longer the movies, the fewer are in a batch.

    Args:
        movies: int64 ``[N]``, distinct positions in the feature index.
        rows: ``[M]`` rows of each movie of the index.
        spec: Rows of a window.
        windows: Maximum number of windows per movie, K.
        global_batch: Maximum number of windows per batch, over all ranks.
        n_slices: Ranks that share a batch.
        max_rows: Maximum number of rows per rank and batch of complete movies, including padding; a
            single movie may be longer.
    """
    positions = movie_set(movies)
    n_rows = rows[positions]
    start, is_new = _spaced(spec.max_start(n_rows), windows)
    # Ordered by movie, then by k: all windows of a movie are read one after another.
    start_NK, is_new_NK = start.reshape(windows, -1).T, is_new.reshape(windows, -1).T
    place, window_index = np.nonzero(is_new_NK)
    start = start_NK[is_new_NK]
    length = spec.length(n_rows[place], start)
    if spec.window is None:
        by_length = np.argsort(length, kind="stable")
        place, window_index, start, length = (
            each[by_length] for each in (place, window_index, start, length)
        )
        edges = _edges_within(length, global_batch, n_slices, max_rows)
        capacity = np.diff(edges)
    else:
        steps = count_steps(len(place), global_batch, drop_last=False)
        edges = np.minimum(np.arange(steps + 1) * global_batch, len(place))
        capacity = np.full(steps, min(len(place), global_batch), np.int64)
    return WindowPlan(spec, positions[place], window_index, start, length, edges, capacity)


def frame_order(seed: int, movie: int, n_rows: int) -> IntArray:
    """Return a permutation of a movie's rows, int64 ``[n_rows]``, fixed by (seed, movie).

    Args:
        seed: Seed of the order.
        movie: Position in the feature index.
        n_rows: Rows of the movie.
    """
    return sort_order(_words(seed, movie, _FRAMES, 0, n_rows))


def covering_runs(rows: IntArray, near: int) -> tuple[IntArray, IntArray]:
    """Return the begins and ends of the runs that cover ``rows``, ascending, int64 ``[R]`` each.

    A run includes small gaps between its rows. An end is one past the last row of its run.

    Args:
        rows: int64 ``[N]``, distinct rows in any order, at least one.
        near: Maximum distance of two neighbours within a run.
    """
    sorted_N = np.sort(rows)
    breaks = np.flatnonzero(np.diff(sorted_N) > near)
    return sorted_N[np.append(0, breaks + 1)], sorted_N[np.append(breaks, -1)] + 1


def sort_order(words: Words) -> IntArray:
    """Return the permutation, int64 ``[N]``, that sorts uint64 ``words`` by their upper bits.

    Ties are sorted by position. The position is stored in the lower bits, so that all keys differ:
    a plain sort then equals a stable argsort on every platform, in half the time.
    """
    bits = np.uint64(len(words).bit_length())
    keys = (words >> bits << bits) | np.arange(len(words), dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def uniform_below(words: Words, limit: IntArray) -> IntArray:
    """Return ``floor(word * limit / 2**64)``: uniform in ``[0, limit)``, without rejection.

    ``words`` are uint64 ``[N]``, ``limit`` and the result are int64 ``[N]``.

    The 128-bit product is computed exactly from two 64-bit products. The probability of a value
    differs from 1/limit by less than 2**-64. The relative error is below ``limit * 2**-64``: below
    2**-40 for movies of up to 2**24 rows, and below 2**-32 for all movies.
    """
    half = np.uint64(32)
    bound = limit.astype(np.uint64)
    low = (words & np.uint64(0xFFFFFFFF)) * bound >> half
    return (((words >> half) * bound + low) >> half).astype(np.int64)


def _words(
    seed: int, second: int, purpose: int, window_index: int, n_words: int, movie: int = 0
) -> Words:
    """Return raw words, uint64 ``[n_words]``; word i does not depend on ``n_words``."""
    key = np.array([seed, second], np.uint64)
    counter = np.array([0, movie, window_index, purpose], np.uint64)
    words: Words = np.random.Philox(key=key, counter=counter).random_raw(n_words)
    return words


def _window_words(order: SamplingOrder, epoch: int, purpose: int, positions: IntArray) -> Words:
    """Return one word per window, uint64 ``[K * N]``, ordered by k, then by movie.

    Words are drawn up to the last position and then selected: a word depends on the position of its
    movie, not on the other movies of the split.
    """
    n_words = int(positions[-1]) + 1 if len(positions) else 0
    window_indices = range(order.windows_per_movie)
    return np.concatenate(
        [
            _words(order.seed, epoch, purpose, window_index, n_words)[positions]
            for window_index in window_indices
        ]
    )


def _groups(order: SamplingOrder, epoch: int, shard: NDArray[np.integer[Any]]) -> IntArray:
    """Return the group of each movie, int64 ``[N]``: consecutive shards of a permutation.

    Args:
        order: Settings of the order.
        epoch: From 0.
        shard: ``[N]`` shard of each movie of the epoch. Shards without a movie are not counted,
            since they would make groups differ in size.
    """
    present = np.flatnonzero(np.bincount(shard))
    n_words = int(present[-1]) + 1 if len(present) else 0
    words = _words(order.seed, epoch, _SHARDS, 0, n_words)[present]
    group_of = np.zeros(n_words, np.int64)
    group_of[present[sort_order(words)]] = np.arange(len(present)) // order.shuffle_block_shards
    group: IntArray = group_of[shard]
    return group


def _spaced(max_start: IntArray, windows: int) -> tuple[IntArray, NDArray[np.bool_]]:
    """Return evenly spaced starts, and whether each differs from the one before in its movie.

    Both are ``[K * N]``, int64 and bool, ordered by k, then by movie.

    Args:
        max_start: int64 ``[N]``, last start of a window in each movie.
        windows: Windows per movie, K.
    """
    index_K1 = np.arange(windows)[:, None]
    start_KN = max_start * index_K1 // (windows - 1) if windows > 1 else (max_start // 2)[None, :]
    return start_KN.reshape(-1), (np.diff(start_KN, axis=0, prepend=-1) > 0).reshape(-1)


def _bucketed(order: SamplingOrder, epoch: int, sequence: IntArray, length: IntArray) -> IntArray:
    """Sort each bucket of ``order.bucket_batches`` global batches by length, and permute them.

    Sorting makes the movies of a batch similar in length, which saves padding. The permutation of
    the batches then removes the order from short to long. The short last batch stays last, since
    its size is fixed.

    Args:
        order: Settings of the order.
        epoch: From 0.
        sequence: int64 ``[N]``, window numbers in training order.
        length: int64 ``[N]``, rows of each window.
    """
    size, n_full = order.global_batch, len(sequence) // order.global_batch
    full, rest = np.split(sequence, [n_full * size])
    bucket = np.arange(len(full)) // (size * order.bucket_batches)
    full = full[np.lexsort((length[: len(full)], bucket))]  # stable: equal lengths stay permuted
    shuffled = sort_order(_words(order.seed, epoch, _BATCHES, 0, n_full))
    shuffled = shuffled[np.argsort(shuffled // order.bucket_batches, kind="stable")]
    return np.concatenate([full.reshape(n_full, size)[shuffled].reshape(-1), rest])


def _edges_within(length: IntArray, global_batch: int, n_slices: int, max_rows: int) -> IntArray:
    """Divide windows into batches of at most ``max_rows`` padded rows per slice.

    Args:
        length: int64 ``[N]``, ascending: the last window of a batch determines its padding.
        global_batch: Maximum number of windows per batch.
        n_slices: Ranks that share a batch.
        max_rows: Maximum number of padded rows per slice; a slice has at least one window.

    Returns:
        int64 ``[steps + 1]``, first window of each batch, and the end of the last one.
    """
    edges = [0]
    while edges[-1] < len(length):
        first = edges[-1]
        size = min(global_batch, len(length) - first)
        while size > n_slices and -(-size // n_slices) * length[first + size - 1] > max_rows:
            size = max(n_slices, size - n_slices)
        edges.append(first + size)
    return np.array(edges, np.int64)
