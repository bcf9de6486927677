"""The epoch, planned: which windows, in which order, in which global batch, for which rank.

Pure numpy; nothing is opened, no clock is asked. Same arguments, same plan, on every machine.

All randomness is raw words of the counter-based generator Philox (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"), which numpy promises to keep (the methods of ``Generator`` it
does not). The key is the pair (seed, epoch), never a sum: with ``seed + epoch`` the second epoch of
seed 0 would be the first of seed 1. The counter says what a word is for: its last limb holds the
purpose, the one before it the visit k, and the word number is the movie. So each word depends on
(seed, epoch, movie, k) alone: neither the other movies of a split nor the order in which windows
are read can change it, and a whole epoch is still drawn in one call.

Axes: M = movies of the feature index, N = windows of the plan, B = windows of a slice.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError

VERSION = 1
"""Version of the order; part of the plan's digest. A change to it is a change to the CHANGELOG."""

IntArray = NDArray[np.int64]
Words = NDArray[np.uint64]

_ORDER, _START, _SHARDS, _FRAMES = range(4)  # purposes: the last limb of the counter


@dataclass(frozen=True)
class Order:
    """Everything that decides the order of training, and nothing else.

    The number of ranks and of accumulation steps is absent on purpose: the global batches are the
    same for all of them.

    Raises:
        ConfigError: a field is out of range.
    """

    seed: int
    """0 to 2**64 - 1."""

    frames: int
    """Rows of a window."""

    windows_per_movie: int
    """Visits of each movie an epoch."""

    global_batch: int
    """Windows of one optimiser step."""

    drop_last: bool = False
    """Leave out a short last global batch."""

    blocks: int = 0
    """0: one permutation of all windows; k: shards permuted, grouped by k, windows permuted in
    each group."""

    shuffle_frames: bool = False
    """Rows of each movie are permuted before windows are cut."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"stream.seed: got {self.seed}, want 0 to 2**64 - 1")
        for name in ("frames", "windows_per_movie", "global_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stream.{name}: got {getattr(self, name)}, want at least 1")
        if self.blocks < 0:
            raise ConfigError(f"stream.blocks: got {self.blocks}, want 0 or more")

    def steps(self, n_movies: int) -> int:
        """Return the optimiser steps of an epoch over ``n_movies`` movies."""
        return count_steps(
            n_movies * self.windows_per_movie, self.global_batch, drop_last=self.drop_last
        )

    def digest(self, movies: IntArray) -> str:
        """Return the sha256 of the order over the set ``movies``, in hexadecimal.

        Args:
            movies: int64, distinct positions in the feature index; their order does not matter.
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

    visit: IntArray
    """k: which of its movie's windows this is."""

    start: IntArray
    """First row of the window."""

    weight: NDArray[np.float32]
    """1, or 0 for padding."""

    global_weight: float
    """W: sum of the weights of the whole global batch, over all ranks and micro-batches."""


@dataclass(frozen=True)
class WindowPlan:
    """Windows in the order in which they are used, cut into global batches."""

    movie: IntArray
    """``[N]`` positions in the feature index."""

    visit: IntArray
    """``[N]`` k: which of its movie's windows this is."""

    start: IntArray
    """``[N]`` first row of the window."""

    global_batch: int
    """Windows of a global batch; the last one may be short."""

    steps: int
    """Number of global batches."""

    def slice(self, step: int, part: int, parts: int) -> Slice:
        """Return slice ``part`` of ``parts`` equal slices of global batch ``step``.

        The windows of the batch are dealt evenly (their numbers differ by at most 1), in order;
        every slice of every step has the same length B.

        Args:
            step: 0 to ``steps - 1``.
            part: 0 to ``parts - 1``; micro-batch x ranks + rank.
            parts: Ranks x micro-batches.
        """
        first = step * self.global_batch
        n_windows = min(self.global_batch, len(self.movie) - first)
        size = slice_size(len(self.movie), self.global_batch, parts)
        begin, end = (first + n_windows * edge // parts for edge in (part, part + 1))
        chosen = np.full(size, first, np.int64)
        chosen[: end - begin] = np.arange(begin, end)
        weight = (np.arange(size) < end - begin).astype(np.float32)
        return Slice(
            self.movie[chosen],
            self.visit[chosen],
            self.start[chosen],
            weight,
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
    """Return ``movies`` in order of position.

    Raises:
        ValueError: one is named twice, or is negative.
    """
    positions = np.asarray(movies, np.int64)
    if not (positions[1:] > positions[:-1]).all():
        positions = np.sort(positions)
    if (positions[:1] < 0).any() or (positions[1:] == positions[:-1]).any():
        raise ValueError("movies: got a position twice or below 0, want distinct positions")
    return positions


def plan_epoch(
    order: Order,
    movies: IntArray,
    rows: NDArray[np.integer[Any]],
    *,
    epoch: int,
    shard: NDArray[np.integer[Any]] | None = None,
) -> WindowPlan:
    """Plan one epoch of training.

    Args:
        order: What decides the order.
        movies: int64, distinct positions in the feature index; their order does not matter.
        rows: ``[M]`` rows of each movie of the index, below 2**32.
        epoch: From 0.
        shard: ``[M]`` shard of each movie of the index; needed with ``order.blocks``.

    Returns:
        Each movie ``windows_per_movie`` times (with ``drop_last``, less the short last batch).

    Raises:
        ValueError: a position twice, or ``blocks`` without ``shard``.
    """
    positions = movie_set(movies)
    n_movies, n_visits = len(positions), order.windows_per_movie
    words = _visit_words(order, epoch, _ORDER, positions)
    sequence = sort_order(words)
    if order.blocks:
        if shard is None:
            raise ValueError("blocks: got no shard numbers, want one for each movie of the index")
        group = np.tile(_groups(order, epoch, shard[positions]), n_visits)
        # Stable, so windows stay permuted within a group; 16-bit keys are sorted by radix.
        small = group.astype(np.min_scalar_type(int(group.max(initial=0))))
        sequence = sequence[np.argsort(small[sequence], kind="stable")]
    steps = order.steps(n_movies)
    sequence = sequence[: steps * order.global_batch]
    room = np.maximum(rows[positions].astype(np.int64) - order.frames, 0)
    start = uniform_below(
        _visit_words(order, epoch, _START, positions), np.tile(room + 1, n_visits)
    )
    visit, place = np.divmod(sequence, max(n_movies, 1))
    return WindowPlan(positions[place], visit, start[sequence], order.global_batch, steps)


def plan_scoring(
    movies: IntArray,
    rows: NDArray[np.integer[Any]],
    *,
    frames: int,
    windows: int,
    global_batch: int,
) -> WindowPlan:
    """Plan one pass over ``movies`` by evenly spaced windows, in order of position.

    A movie has ``windows`` windows from its first to its last row (the middle one if 1), fewer
    where starts coincide, and one where it is no longer than a window.

    Args:
        movies: int64, distinct positions in the feature index.
        rows: ``[M]`` rows of each movie of the index.
        frames: Rows of a window.
        windows: Windows wanted of each movie, K.
        global_batch: Windows of one batch over all ranks.
    """
    positions = movie_set(movies)
    room_n1 = np.maximum(rows[positions].astype(np.int64) - frames, 0)[:, None]
    visit_1k = np.arange(windows)[None, :]
    start_nk = room_n1 * visit_1k // (windows - 1) if windows > 1 else room_n1 // 2
    fresh_nk = np.diff(start_nk, axis=1, prepend=-1) > 0
    place, visit = np.nonzero(fresh_nk)
    steps = count_steps(len(place), global_batch, drop_last=False)
    return WindowPlan(positions[place], visit, start_nk[fresh_nk], global_batch, steps)


def frame_order(seed: int, movie: int, n_rows: int) -> IntArray:
    """Return a permutation of a movie's rows that depends on (seed, movie) alone.

    Args:
        seed: Seed of the order.
        movie: Position in the feature index.
        n_rows: Rows of the movie.
    """
    return sort_order(_words(seed, movie, _FRAMES, 0, n_rows))


def sort_order(words: Words) -> IntArray:
    """Return the permutation that sorts ``words`` by their upper bits, ties by position.

    The position stands in the lower bits, so all keys differ: a plain sort then gives what a
    stable argsort would, on every platform, in half the time.
    """
    bits = np.uint64(len(words).bit_length())
    keys = (words >> bits << bits) | np.arange(len(words), dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


def uniform_below(words: Words, limit: IntArray) -> IntArray:
    """Return ``floor(word * limit / 2**64)``: uniform in ``[0, limit)``, without rejection.

    The 128-bit product is made of two 64-bit ones, exactly. A value's chance differs from
    1/limit by less than 2**-64: relative to it by less than ``limit * 2**-64``, which is below
    2**-40 for movies of up to 2**24 rows, and below 2**-32 for any.
    """
    half = np.uint64(32)
    bound = limit.astype(np.uint64)
    low = (words & np.uint64(0xFFFFFFFF)) * bound >> half
    return (((words >> half) * bound + low) >> half).astype(np.int64)


def _words(seed: int, second: int, purpose: int, visit: int, n_words: int) -> Words:
    """Return ``n_words`` raw words; word i does not depend on ``n_words``."""
    key = np.array([seed, second], np.uint64)
    counter = np.array([0, 0, visit, purpose], np.uint64)
    words: Words = np.random.Philox(key=key, counter=counter).random_raw(n_words)
    return words


def _visit_words(order: Order, epoch: int, purpose: int, positions: IntArray) -> Words:
    """Return one word for each visit of each movie, visit by visit."""
    n_words = int(positions[-1]) + 1 if len(positions) else 0
    visits = range(order.windows_per_movie)
    return np.concatenate(
        [_words(order.seed, epoch, purpose, visit, n_words)[positions] for visit in visits]
    )


def _groups(order: Order, epoch: int, shard: NDArray[np.integer[Any]]) -> IntArray:
    """Return the group of each movie: shards permuted, ``order.blocks`` of them a group."""
    present = np.flatnonzero(np.bincount(shard))
    n_words = int(present[-1]) + 1 if len(present) else 0
    words = _words(order.seed, epoch, _SHARDS, 0, n_words)[present]
    group_of = np.zeros(n_words, np.int64)
    group_of[present[sort_order(words)]] = np.arange(len(present)) // order.blocks
    group: IntArray = group_of[shard]
    return group
