"""How sure a figure is: a bootstrap over movies, and paired differences on the same movies.

A draw of the bootstrap is one weight a movie: how often it was drawn. So nothing is copied, and
average precision is computed for all draws at once from one sort.

The intervals are the estimate ± 1.96 standard deviations of the draws. Percentiles of the draws
would lie too high: a resampled split repeats its positives, which lifts average precision. What
they cover is the figure on other splits of as many movies; on far more movies average precision
itself falls a little, since a few movies flatter it.

R = draws, M = movies, G = genres, K = (movie, genre) pairs
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_POSITIVES = 10
"""A genre with fewer positive movies gets no interval: its draws say nothing steady."""

_CHUNK_CELLS = 4_000_000
"""Weights held at once, so that memory stays flat whatever the number of draws."""


@dataclass(frozen=True)
class Interval:
    """Central 95 % by the spread of the draws."""

    low: float
    high: float


@dataclass(frozen=True)
class Draws:
    """Figures of one set of scores in every draw of the bootstrap."""

    genre_ap_RG: Array  # axes
    """NaN where a draw holds no positive of the genre."""

    micro_ap_R: Array

    @property
    def mean_ap_R(self) -> Array:  # noqa: N802
        """Mean over the genres that a draw holds positives of."""
        present_RG = ~np.isnan(self.genre_ap_RG)
        sums_R = np.where(present_RG, self.genre_ap_RG, 0.0).sum(axis=1)
        return np.asarray(sums_R / np.maximum(present_RG.sum(axis=1), 1))


def draw_weights(n_movies: int, draws: int, *, seed: int) -> NDArray[np.uint16]:
    """Return how often each movie is drawn, uint16 ``[R, M]``; every row sums to ``n_movies``.

    Raw Philox words, since numpy keeps those stable over versions, not the methods of
    ``Generator``. (The remainder favours small numbers by less than 1e-15.)
    """
    words_RM = np.random.Philox(key=[seed, 0]).random_raw(draws * n_movies)
    drawn_RM = (words_RM % np.uint64(max(n_movies, 1))).reshape(draws, n_movies)
    counts = [np.bincount(row.astype(np.int64), minlength=n_movies) for row in drawn_RM]
    return np.array(counts, dtype=np.uint16).reshape(draws, n_movies)


def weighted_average_precision(
    positive_K: NDArray[np.bool_], scores_K: NDArray[np.floating], weights_RK: Array
) -> Array:
    """Return average precision of each draw, float64 ``[R]``; NaN without a positive.

    Equal scores form one threshold, as in ``sklearn.metrics.average_precision_score``.

    Args:
        positive_K: What is true.
        scores_K: Higher means more likely; only the order matters.
        weights_RK: How often each pair counts, 0 or more.
    """
    order_K = np.argsort(-scores_K, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores_K[order_K])), len(order_K) - 1)
    sorted_RK = weights_RK[:, order_K]
    # [R, K] -> [R, thresholds]: everything scored at or above the threshold
    seen = np.cumsum(sorted_RK, axis=1)[:, ends]
    hits = np.cumsum(sorted_RK * positive_K[order_K], axis=1)[:, ends]
    gained = np.diff(hits, axis=1, prepend=0.0)
    precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
    total_R = hits[:, -1]
    with np.errstate(invalid="ignore"):
        return np.asarray((gained * precision).sum(axis=1) / np.where(total_R > 0, total_R, np.nan))


def bootstrap(
    labels_MG: NDArray[np.uint8], scores_MG: NDArray[np.floating], weights_RM: NDArray[np.uint16]
) -> Draws:
    """Return the figures of ``scores_MG`` in every draw.

    The same ``weights_RM`` for two sets of scores makes their draws paired.
    """
    positive_MG = labels_MG.astype(bool)
    genres, micro = [np.zeros((0, labels_MG.shape[1]))], [np.zeros(0)]
    for part_RM in _chunks(weights_RM, cells_a_draw=max(labels_MG.size, 1)):
        columns = zip(positive_MG.T, scores_MG.T, strict=True)
        one = [weighted_average_precision(hot, score, part_RM) for hot, score in columns]
        genres.append(np.stack(one, axis=1))
        pairs_RK = np.repeat(part_RM, labels_MG.shape[1], axis=1)
        micro.append(weighted_average_precision(positive_MG.ravel(), scores_MG.ravel(), pairs_RK))
    return Draws(np.concatenate(genres), np.concatenate(micro))


def interval(estimate: float, draws_R: Array, *, bounded: bool = True) -> Interval | None:
    """Return ``estimate`` ± 1.96 standard deviations of its draws; None with fewer than two.

    Args:
        estimate: The figure on the movies as they are.
        draws_R: The figure in every draw; NaN draws are left out.
        bounded: Cut to 0 … 1, for an average precision; a difference is not cut.
    """
    known = draws_R[~np.isnan(draws_R)]
    if len(known) < 2:
        return None
    half = 1.96 * float(known.std(ddof=1))
    low, high = estimate - half, estimate + half
    if bounded:  # both ends: a perfect score may round to a little more than 1
        low, high = min(max(low, 0.0), 1.0), min(max(high, 0.0), 1.0)
    return Interval(low, high)


def _chunks(weights_RM: NDArray[np.uint16], *, cells_a_draw: int) -> Iterator[Array]:
    step = max(_CHUNK_CELLS // cells_a_draw, 1)
    for first in range(0, len(weights_RM), step):
        yield weights_RM[first : first + step].astype(np.float64)
