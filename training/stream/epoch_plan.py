"""The epoch, planned: which windows, in which order, in which global batch, for which rank.

A window is what is read of a movie at a time: neighbouring rows, every k-th row, a random choice of
rows, or the complete movie. Where rows represent shots, shots are planned like frames.

Pure numpy: nothing is opened, no clock is read. Same arguments, same plan, on every machine.

All randomness is raw words of the counter-based generator Philox (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"), which numpy promises to keep (the methods of ``Generator`` it
does not). The key is the pair (seed, epoch), never a sum: with ``seed + epoch`` the second epoch of
seed 0 would be the first of seed 1. The counter defines the use of a word: its last limb holds the
purpose, the one before it the visit k, and the word number is the movie. So each word depends on
(seed, epoch, movie, k) alone (for a choice of rows, the movie is in the counter and the word number
is the row). Neither the other movies of a split nor the order in which windows are read can change
it, and a complete epoch is still drawn in one call.

Axes: M = movies of the feature index, N = windows of the plan (or movies), K = windows of a movie,
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
"""Version of the order; part of the plan's digest. A change to it is a change to the CHANGELOG."""

IntArray = NDArray[np.int64]
Words = NDArray[np.uint64]

Sampling = Literal["random_window", "uniform_windows", "full_movie", "random_frames"]
Unit = Literal["frame", "shot"]

# Purposes: the last limb of the counter.
_ORDER, _START, _SHARDS, _FRAMES, _CHOICE, _BATCHES, _PARTNER, _PARTNER_START = range(8)


@dataclass(frozen=True)
class WindowSpec:
    """Which rows of its movie a window has."""

    window: int | None
    """Rows at most; None: all there are."""

    stride: int = 1
    """Every k-th row."""

    choice: tuple[int, int] | None = None
    """(seed, epoch): a random choice of ``frames`` rows, in their order."""

    shuffle_seed: int | None = None
    """The movie's rows are permuted by (seed, movie) before anything is cut."""

    @property
    def contiguous(self) -> bool:
        """Whether a window is some neighbouring rows in their order."""
        return self.stride == 1 and self.choice is None and self.shuffle_seed is None

    def max_start(self, rows: NDArray[np.integer[Any]]) -> IntArray:
        """Return the last start of a window in movies of so many rows, int64 ``[N]``.

        Args:
            rows: ``[N]`` rows of each movie.
        """
        n_rows = rows.astype(np.int64)
        if self.choice is not None:
            return np.zeros_like(n_rows)  # the rows are chosen from the complete movie
        # A movie that fits into a window has as many starts as the stride has phases in it.
        phases: IntArray = np.maximum(np.minimum(n_rows, self.stride) - 1, 0)
        if self.window is None:
            return phases
        span = (self.window - 1) * self.stride + 1
        return np.where(n_rows >= span, n_rows - span, phases)

    def length(self, rows: NDArray[np.integer[Any]], start: IntArray) -> IntArray:
        """Return how many rows windows have, int64 ``[N]``, each at least 1.

        Args:
            rows: ``[N]`` rows of the movie of each window.
            start: int64 ``[N]``, first row of each window.
        """
        n_rows = -(-(rows.astype(np.int64) - start) // self.stride)
        return n_rows if self.window is None else np.minimum(n_rows, self.window)

    def rows(self, movie: int, window_index: int, start: int, n_rows: int) -> IntArray:
        """Return the rows of one window in its order, int64 ``[length]``.

        Args:
            movie: Position in the feature index.
            window_index: Which of the movie's windows.
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
    """Everything that decides the order of training, and nothing else.

    The number of ranks and of accumulation steps is absent on purpose: the global batches are the
    same for all of them.

    Raises:
        ConfigError: a field is out of range.
    """

    seed: int
    """0 to 2**64 - 1."""

    window: int
    """Rows of a window."""

    windows_per_movie: int
    """Visits of each movie an epoch."""

    global_batch: int
    """Windows of one optimiser step."""

    drop_last: bool = False
    """Leave out a short last global batch."""

    shuffle_block_shards: int = 0
    """0: one permutation of all windows; k: shards permuted, grouped by k, windows permuted in
    each group."""

    shuffle_frames: bool = False
    """Rows of each movie are permuted before windows are cut."""

    sampling: Sampling = "random_window"
    """One of ``stream.sampling``: which rows of a movie are read."""

    stride: int = 1
    """Every k-th row."""

    unit: Unit = "frame"
    """What a row represents."""

    bucket_batches: int = 1
    """With ``full_movie``: global batches that are sorted by length together."""

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
        """Return which rows windows have in an epoch."""
        return WindowSpec(
            window=None if self.sampling == "full_movie" else self.window,
            stride=self.stride,
            choice=(self.seed, epoch) if self.sampling == "random_frames" else None,
            shuffle_seed=self.seed if self.shuffle_frames else None,
        )

    def n_windows(self, rows: NDArray[np.integer[Any]]) -> int:
        """Return the windows of an epoch, those of a short last batch included.

        Args:
            rows: ``[N]`` rows of each movie of the epoch.
        """
        if self.sampling != "uniform_windows":
            return len(rows) * self.windows_per_movie
        return int(
            np.minimum(self.window_spec(0).max_start(rows) + 1, self.windows_per_movie).sum()
        )

    def digest(self, movies: IntArray) -> str:
        """Return the sha256 of the order over the set ``movies``, in hexadecimal.

        Args:
            movies: int64 ``[N]``, distinct positions in the feature index in any order.
        """
        positions = hashlib.sha256(movie_set(movies).astype("<i8").tobytes()).hexdigest()
        fields: dict[str, Any] = {**asdict(self), "version": VERSION, "movies": positions}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class Slice(NamedTuple):
    """The windows of one rank in one micro-batch; all arrays are ``[B]``.

    Padding repeats the first window of the global batch with weight 0: a real window, so that no
    model meets a sample without frames.
    """

    movie: IntArray
    """Positions in the feature index."""

    window_index: IntArray
    """k: which of its movie's windows this is."""

    start: IntArray
    """First row of the window."""

    weight: NDArray[np.float32]
    """1, or 0 for padding."""

    length: IntArray
    """Rows of the window, at least 1."""

    global_weight: float
    """W: sum of the weights of the whole global batch, over all ranks and micro-batches."""


@dataclass(frozen=True)
class WindowPlan:
    """Windows in the order in which they are used, cut into global batches."""

    spec: WindowSpec
    """Which rows each window has."""

    movie: IntArray
    """``[N]`` positions in the feature index."""

    window_index: IntArray
    """``[N]`` k: which of its movie's windows this is."""

    start: IntArray
    """``[N]`` first row of the window."""

    length: IntArray
    """``[N]`` rows of the window."""

    edges: IntArray
    """``[steps + 1]`` number of the first window of each global batch, and of the end."""

    capacity: IntArray
    """``[steps]`` windows of a full global batch: a short one is filled up to it."""

    @property
    def steps(self) -> int:
        """Number of global batches."""
        return len(self.capacity)

    def slice(self, step: int, part: int, parts: int) -> Slice:
        """Return slice ``part`` of ``parts`` equal slices of global batch ``step``.

        The windows of the batch are dealt evenly (their numbers differ by at most 1), in order;
        all slices of a step have the same number of places B.

        Args:
            step: 0 to ``steps - 1``.
            part: 0 to ``parts - 1``; micro-batch x ranks + rank.
            parts: Ranks x micro-batches.
        """
        first, stop = self.edges[step : step + 2].tolist()
        # B is computed from a full batch (``room``): a short one has the same shape on every rank.
        n_windows = stop - first
        size = -(-int(self.capacity[step]) // parts)
        begin, end = (first + n_windows * edge // parts for edge in (part, part + 1))
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


def slice_size(n_windows: int, global_batch: int, parts: int) -> int:
    """Return B, the length of each of ``parts`` slices: the same for every step and rank."""
    return -(-min(n_windows, global_batch) // parts)


def padding_share(n_windows: int, global_batch: int, parts: int, *, drop_last: bool) -> float:
    """Return the share of an epoch's windows that are padding, 0 to 1."""
    steps = count_steps(n_windows, global_batch, drop_last=drop_last)
    places = steps * parts * slice_size(n_windows, global_batch, parts)
    return 1 - min(n_windows, steps * global_batch) / places if places else 0.0


def movie_set(movies: IntArray) -> IntArray:
    """Return ``movies`` in order of position, int64 ``[N]``.

    Args:
        movies: ``[N]`` positions in the feature index, in any order.

    Raises:
        ValueError: one is named twice, or is negative.
    """
    positions = np.asarray(movies, np.int64)
    # Usually they are sorted already, and a check costs less than a sort of a million.
    if not (positions[1:] > positions[:-1]).all():
        positions = np.sort(positions)
    if (positions[:1] < 0).any() or (positions[1:] == positions[:-1]).any():
        raise ValueError("movies: got a position twice or below 0, want distinct positions")
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
        order: What decides the order.
        movies: int64 ``[N]``, distinct positions in the feature index in any order.
        rows: ``[M]`` rows of each movie of the index, below 2**32.
        epoch: From 0.
        shard: ``[M]`` shard of each movie of the index; needed with ``order.shuffle_block_shards``.

    Returns:
        Each movie ``windows_per_movie`` times (with ``drop_last``, less the short last batch).

    Raises:
        ValueError: a position twice, or ``shuffle_block_shards`` without ``shard``.
    """
    positions, cut = movie_set(movies), order.window_spec(epoch)
    n_rows, n_visits = rows[positions], order.windows_per_movie
    sequence = _permuted(order, epoch, positions, shard)
    room = cut.max_start(n_rows)
    if order.sampling == "uniform_windows":
        # Starts that coincide in a short movie are one window.
        start, fresh = _spaced(room, n_visits)
        sequence = sequence[fresh[sequence]]
    else:
        words = _visit_words(order, epoch, _START, positions)
        start = uniform_below(words, np.tile(room + 1, n_visits))
    steps = count_steps(len(sequence), order.global_batch, drop_last=order.drop_last)
    sequence = sequence[: steps * order.global_batch]  # shorter only with drop_last
    length = cut.length(np.tile(n_rows, n_visits), start)
    if order.sampling == "full_movie":
        sequence = _bucketed(order, epoch, sequence, length[sequence])
    window_index, place = np.divmod(
        sequence, max(len(positions), 1)
    )  # windows are numbered by visit
    # An epoch smaller than a global batch is one batch of its own size, not padded to a full one.
    n_full = min(order.n_windows(n_rows), order.global_batch)
    return WindowPlan(
        cut,
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
    """Return the numbers of all windows, int64 ``[K * N]``, permuted together or in groups."""
    sequence = sort_order(_visit_words(order, epoch, _ORDER, positions))
    if not order.shuffle_block_shards:
        return sequence
    if shard is None:
        raise ValueError(
            "shuffle_block_shards: got no shard numbers, want one for each movie of the index"
        )
    group = np.tile(_groups(order, epoch, shard[positions]), order.windows_per_movie)
    # Stable, so windows stay permuted within a group; 16-bit keys are sorted by radix.
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
    """Plan a window of another movie for each window, to mix the two.

    Args:
        plan: Of ``plan_epoch`` with the same arguments.
        order: What decides the order.
        movies: int64 ``[N]``, distinct positions in the feature index to draw partners from.
        rows: ``[M]`` rows of each movie of the index.
        epoch: From 0.

    Returns:
        For each window its partner, at the same place: so on the same rank, on any number of them.
        Which it is depends on (seed, epoch, movie, k) and the set of movies.
    """
    positions = movie_set(movies)
    # Words are drawn visit by visit: those of a window do not depend on where it is in the epoch.
    place = plan.window_index * len(positions) + np.searchsorted(positions, plan.movie)
    words = _visit_words(order, epoch, _PARTNER, positions)[place]
    partner = positions[uniform_below(words, np.full(len(words), len(positions)))]
    words = _visit_words(order, epoch, _PARTNER_START, positions)[place]
    start = uniform_below(words, plan.spec.max_start(rows[partner]) + 1)
    length = plan.spec.length(rows[partner], start)
    return replace(plan, movie=partner, start=start, length=length)


def plan_scoring(
    movies: IntArray,
    rows: NDArray[np.integer[Any]],
    *,
    cut: WindowSpec,
    windows: int,
    global_batch: int,
    parts: int = 1,
    most_rows: int = 2**16,
) -> WindowPlan:
    """Plan one pass over ``movies``, each exactly once: evenly spaced windows, or whole.

    A movie has ``windows`` windows from its first to its last row (the middle one if 1), fewer
    where starts coincide, and one where it is no longer than a window; in order of position. Whole
    movies come in order of length, so that little is padded; the longer they are, the fewer are in
    a batch.

    Args:
        movies: int64 ``[N]``, distinct positions in the feature index.
        rows: ``[M]`` rows of each movie of the index.
        cut: Which rows a window has.
        windows: Windows wanted of each movie, K.
        global_batch: Windows of one batch over all ranks, at most.
        parts: Ranks that share a batch.
        most_rows: Of whole movies: rows of one rank's batch, padding included, at most; one movie
            may be longer.
    """
    positions = movie_set(movies)
    n_rows = rows[positions]
    start, fresh = _spaced(cut.max_start(n_rows), windows)
    # Movie by movie, not visit by visit: the windows of a movie are read one after the other.
    start_NK, fresh_NK = start.reshape(windows, -1).T, fresh.reshape(windows, -1).T
    place, window_index = np.nonzero(fresh_NK)
    start = start_NK[fresh_NK]
    length = cut.length(n_rows[place], start)
    if cut.window is None:
        by_length = np.argsort(length, kind="stable")
        place, window_index, start, length = (
            each[by_length] for each in (place, window_index, start, length)
        )
        edges = _edges_within(length, global_batch, parts, most_rows)
        room = np.diff(edges)
    else:
        steps = count_steps(len(place), global_batch, drop_last=False)
        edges = np.minimum(np.arange(steps + 1) * global_batch, len(place))
        room = np.full(steps, min(len(place), global_batch), np.int64)
    return WindowPlan(cut, positions[place], window_index, start, length, edges, room)


def frame_order(seed: int, movie: int, n_rows: int) -> IntArray:
    """Return a permutation of a movie's rows, int64 ``[n_rows]``, fixed by (seed, movie).

    Args:
        seed: Seed of the order.
        movie: Position in the feature index.
        n_rows: Rows of the movie.
    """
    return sort_order(_words(seed, movie, _FRAMES, 0, n_rows))


def covering_runs(rows: IntArray, near: int) -> tuple[IntArray, IntArray]:
    """Return begins and ends of the runs that cover ``rows``, in order; gaps below ``near`` count.

    Both are int64 ``[R]``, an end one past the last row of its run.

    Args:
        rows: int64 ``[N]``, distinct rows in any order, at least one.
        near: Largest distance of two neighbours of a run.
    """
    sorted_N = np.sort(rows)
    breaks = np.flatnonzero(np.diff(sorted_N) > near)
    return sorted_N[np.append(0, breaks + 1)], sorted_N[np.append(breaks, -1)] + 1


def sort_order(words: Words) -> IntArray:
    """Return the permutation, int64 ``[N]``, that sorts uint64 ``words`` by their upper bits.

    Ties are sorted by position.

    The position is in the lower bits, so all keys differ: a plain sort then gives what a
    stable argsort would, on every platform, in half the time.
    """
    bits = np.uint64(len(words).bit_length())
    keys = (words >> bits << bits) | np.arange(len(words), dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def uniform_below(words: Words, limit: IntArray) -> IntArray:
    """Return ``floor(word * limit / 2**64)``: uniform in ``[0, limit)``, without rejection.

    ``words`` are uint64 ``[N]``, ``limit`` and the result int64 ``[N]``.

    The 128-bit product is made of two 64-bit ones, exactly. A value's chance differs from
    1/limit by less than 2**-64: relative to it by less than ``limit * 2**-64``, which is below
    2**-40 for movies of up to 2**24 rows, and below 2**-32 for any.
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


def _visit_words(order: SamplingOrder, epoch: int, purpose: int, positions: IntArray) -> Words:
    """Return one word for each visit of each movie, uint64 ``[K * N]``, visit by visit.

    Words are drawn up to the last position and then selected: a word depends on its movie's
    position, not on which other movies the split has.
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
    """Return the group of each movie, int64 ``[N]``: permuted shards in groups.

    Args:
        order: What decides the order.
        epoch: From 0.
        shard: ``[N]`` shard of each movie of the epoch. Shards without one are not counted, else
            groups would differ in size.
    """
    present = np.flatnonzero(np.bincount(shard))
    n_words = int(present[-1]) + 1 if len(present) else 0
    words = _words(order.seed, epoch, _SHARDS, 0, n_words)[present]
    group_of = np.zeros(n_words, np.int64)
    group_of[present[sort_order(words)]] = np.arange(len(present)) // order.shuffle_block_shards
    group: IntArray = group_of[shard]
    return group


def _spaced(room: IntArray, windows: int) -> tuple[IntArray, NDArray[np.bool_]]:
    """Return evenly spaced starts ``[K * N]``, visit by visit, and which are new ones, bool.

    Args:
        room: int64 ``[N]``, last start of a window in each movie.
        windows: Windows per movie, K.
    """
    visit_K1 = np.arange(windows)[:, None]
    start_KN = room * visit_K1 // (windows - 1) if windows > 1 else (room // 2)[None, :]
    return start_KN.reshape(-1), (np.diff(start_KN, axis=0, prepend=-1) > 0).reshape(-1)


def _bucketed(order: SamplingOrder, epoch: int, sequence: IntArray, length: IntArray) -> IntArray:
    """Sort ``order.pool`` full global batches at a time by length, and permute these batches.

    Sorting makes the movies of a batch about equally long, which saves padding. Permuting then
    removes the order from short to long. The short last batch stays last, since its size is fixed.

    Args:
        order: What decides the order.
        epoch: From 0.
        sequence: int64 ``[N]``, windows in their order.
        length: int64 ``[N]``, rows of each of them.
    """
    size, n_full = order.global_batch, len(sequence) // order.global_batch
    full, rest = np.split(sequence, [n_full * size])
    pool = np.arange(len(full)) // (size * order.bucket_batches)
    full = full[np.lexsort((length[: len(full)], pool))]  # stable: equal lengths stay permuted
    shuffled = sort_order(_words(order.seed, epoch, _BATCHES, 0, n_full))
    shuffled = shuffled[np.argsort(shuffled // order.bucket_batches, kind="stable")]
    return np.concatenate([full.reshape(n_full, size)[shuffled].reshape(-1), rest])


def _edges_within(length: IntArray, global_batch: int, parts: int, most_rows: int) -> IntArray:
    """Cut windows into batches of at most ``most_rows`` padded rows per part.

    Args:
        length: int64 ``[N]``, ascending: the last window of a batch decides its padding.
        global_batch: Windows of a batch, at most.
        parts: Ranks that share a batch.
        most_rows: Padded rows of one part, at most; a part has at least one window.

    Returns:
        int64 ``[steps + 1]``, number of the first window of each batch, and of the end.
    """
    edges = [0]
    while edges[-1] < len(length):
        first = edges[-1]
        size = min(global_batch, len(length) - first)
        while size > parts and -(-size // parts) * length[first + size - 1] > most_rows:
            size = max(parts, size - parts)
        edges.append(first + size)
    return np.array(edges, np.int64)
