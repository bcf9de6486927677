"""Confidence intervals: a bootstrap over movies, with paired differences on the same movies.

A bootstrap draw is one weight per movie, the number of times it was drawn. No scores are copied,
and average precision is computed for all draws at once from a single sort.

An interval is the estimate ± t standard deviations of the draws, where t is the quantile of
Student's distribution for as many movies as the figure depends on: the positive movies of a genre,
all movies otherwise. That of an average precision is computed on its logits (delta method), so it
is longer towards 0.5 and never leaves 0 … 1. Percentiles of the draws are biased upwards, because
a resampled split repeats its positives, which raises average precision.

Estimand: the expected figure on other splits with as many movies of the same population. On many
more movies average precision itself is slightly lower, because small splits flatter it.
``tests/bench/study_intervals.py`` measures by simulation how often the intervals cover it.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 22. Boyd, Eng
and Page, Area under the Precision-Recall Curve, 2013 (logit intervals of average precision).

R = draws, M = movies, G = genres, K = (movie, genre) pairs
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_POSITIVES = 10
"""A genre with fewer positive movies gets no interval: the spread of its draws is unreliable."""

_CHUNK_CELLS = 4_000_000
"""Weights per chunk of draws. It bounds memory for any number of draws."""


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, from the standard deviation of the draws."""

    low: float
    high: float


@dataclass(frozen=True)
class Draws:
    """Figures of one set of scores in every bootstrap draw."""

    genre_ap_RG: Array
    """float64 ``[R, G]``; NaN where a draw contains no positive movie of the genre."""

    micro_ap_R: Array
    """float64 ``[R]``."""

    @property
    def mean_ap_R(self) -> Array:  # noqa: N802
        """Mean over the genres with a positive movie in the draw, float64 ``[R]``."""
        present_RG = ~np.isnan(self.genre_ap_RG)
        sums_R = np.where(present_RG, self.genre_ap_RG, 0.0).sum(axis=1)
        return np.asarray(sums_R / np.maximum(present_RG.sum(axis=1), 1))


def draw_weights(n_movies: int, draws: int, *, seed: int) -> NDArray[np.uint16]:
    """Return how often each movie is drawn, uint16 ``[R, M]``; every row sums to ``n_movies``.

    The draws are remainders of raw Philox words, which numpy keeps stable across versions, unlike
    the methods of ``Generator``. The bias of the remainder is below 1e-15.
    """
    words_RM = np.random.Philox(key=[seed, 0]).random_raw(draws * n_movies)
    drawn_RM = (words_RM % np.uint64(max(n_movies, 1))).reshape(draws, n_movies)
    counts = [np.bincount(row.astype(np.int64), minlength=n_movies) for row in drawn_RM]
    return np.array(counts, dtype=np.uint16).reshape(draws, n_movies)


def weighted_average_precision(
    positive_K: NDArray[np.bool_], scores_K: NDArray[np.floating], weights_RK: Array
) -> Array:
    """Return the average precision of each draw, float64 ``[R]``; NaN without a positive.

    Equal scores form one threshold, as in ``sklearn.metrics.average_precision_score``.

    Args:
        positive_K: Ground truth, bool ``[K]``.
        scores_K: ``[K]``; higher means more likely, and only the order matters.
        weights_RK: Weight of each pair in each draw, 0 or more, float64 ``[R, K]``.
    """
    order_K = np.argsort(-scores_K, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores_K[order_K])), len(order_K) - 1)
    sorted_RK = weights_RK[:, order_K]
    # [R, K] -> [R, thresholds]: weight of everything scored at or above each threshold
    seen = np.cumsum(sorted_RK, axis=1)[:, ends]
    hits = np.cumsum(sorted_RK * positive_K[order_K], axis=1)[:, ends]
    gained = np.diff(hits, axis=1, prepend=0.0)
    precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
    total_R = hits[:, -1]  # the lowest threshold accepts every pair
    with np.errstate(invalid="ignore"):
        return np.asarray((gained * precision).sum(axis=1) / np.where(total_R > 0, total_R, np.nan))


def bootstrap(
    labels_MG: NDArray[np.uint8], scores_MG: NDArray[np.floating], weights_RM: NDArray[np.uint16]
) -> Draws:
    """Return the figures of ``scores_MG`` in every draw.

    Two calls with the same ``weights_RM`` give paired draws.

    Args:
        labels_MG: Ground truth, uint8 0 or 1.
        scores_MG: Logits or probabilities.
        weights_RM: See ``draw_weights``.
    """
    positive_MG = labels_MG.astype(bool)
    genres, micro = [np.zeros((0, labels_MG.shape[1]))], [np.zeros(0)]
    for chunk_RM in _chunks(weights_RM, cells_per_draw=max(labels_MG.size, 1)):
        columns = zip(positive_MG.T, scores_MG.T, strict=True)
        aps = [weighted_average_precision(hot, score, chunk_RM) for hot, score in columns]
        genres.append(np.stack(aps, axis=1))
        pairs_RK = np.repeat(chunk_RM, labels_MG.shape[1], axis=1)
        micro.append(weighted_average_precision(positive_MG.ravel(), scores_MG.ravel(), pairs_RK))
    return Draws(np.concatenate(genres), np.concatenate(micro))


def interval(
    estimate: float, draws_R: Array, *, movies: int, bounded: bool = True
) -> Interval | None:
    """Return the 95 % interval of ``estimate``; None with fewer than two usable draws or movies.

    Args:
        estimate: The figure on the movies as they are.
        draws_R: The figure in every draw; NaN draws are ignored.
        movies: Movies that the figure depends on; for a genre, those that have it.
        bounded: The figure is an average precision. A difference is not bounded.
    """
    usable_R = draws_R[~np.isnan(draws_R)]
    if min(len(usable_R), movies) < 2:
        return None
    half = _t_quantile(movies - 1) * float(usable_R.std(ddof=1))
    if not bounded:
        return Interval(estimate - half, estimate + half)
    estimate = min(max(estimate, 0.0), 1.0)  # rounding can lift a perfect score above 1
    if not half or estimate in (0.0, 1.0):
        return Interval(max(estimate - half, 0.0), min(estimate + half, 1.0))
    centre, slope = math.log(estimate / (1 - estimate)), estimate * (1 - estimate)
    return Interval(_sigmoid(centre - half / slope), _sigmoid(centre + half / slope))


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))  # no overflow


def _t_quantile(freedom: int) -> float:
    """Return Student's 97.5 % quantile (Abramowitz and Stegun 26.7.5); within 0.001 from 9 on."""
    z, n = 1.959964, freedom
    second, third = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    fourth = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + second / n + third / (n * n) + fourth / (n * n * n)


def _chunks(weights_RM: NDArray[np.uint16], *, cells_per_draw: int) -> Iterator[Array]:
    step = max(_CHUNK_CELLS // cells_per_draw, 1)
    for first in range(0, len(weights_RM), step):
        yield weights_RM[first : first + step].astype(np.float64)
