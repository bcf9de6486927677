"""Point metrics of multi-label genres, from scikit-learn, on arrays alone.

M = movies, G = genres. Genres without a positive movie have no average precision: they are nan
where one is asked for, and left out of means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_recall_curve,
    precision_recall_fscore_support,
)


@dataclass(frozen=True)
class GenreMetrics:
    """How well one genre is told."""

    genre: str
    precision: float
    """At the threshold; 0 where nothing is predicted."""

    recall: float
    """At the threshold; 0 where there is nothing to find."""

    ap: float
    """Average precision; nan where no movie has the genre."""

    support: int
    """Movies that have the genre."""


def genre_metrics(
    labels_MG: NDArray[np.generic],
    probabilities_MG: NDArray[np.floating],
    genres: Sequence[str],
    threshold: float = 0.5,
) -> tuple[GenreMetrics, ...]:
    """Return precision, recall, average precision and support of each genre.

    Args:
        labels_MG: 0 or 1.
        probabilities_MG: 0 to 1; a genre is predicted from ``threshold`` on.
        genres: Names, in the order of the columns.
        threshold: The same for all genres.
    """
    labels_MG = _checked(labels_MG, probabilities_MG)
    precision_G, recall_G, _, support_G = precision_recall_fscore_support(
        labels_MG, probabilities_MG >= threshold, average=None, zero_division=0
    )
    return tuple(
        GenreMetrics(genre, float(p), float(r), ap, int(n))
        for genre, p, r, ap, n in zip(
            genres,
            precision_G,
            recall_G,
            genre_aps(labels_MG, probabilities_MG),
            support_G,
            strict=True,
        )
    )


@dataclass(frozen=True)
class F1:
    """How well genres are told at a threshold."""

    micro: float
    """Over all pairs of movie and genre."""

    macro: float
    """Mean over the genres that a movie has."""

    weighted: float
    """Mean over genres, by the movies that have them, as in the published selection of models."""


def f1_at(
    labels_MG: NDArray[np.generic], probabilities_MG: NDArray[np.floating], threshold: float
) -> F1:
    """Return F1 where a genre is predicted from ``threshold`` on; 0 where there is nothing."""
    labels_MG = _checked(labels_MG, probabilities_MG)
    predicted_MG = probabilities_MG >= threshold
    present_G = labels_MG.any(axis=0)
    if not present_G.any():
        return F1(0.0, 0.0, 0.0)
    by_genre_G = f1_score(labels_MG, predicted_MG, average=None, zero_division=0)
    return F1(
        micro=float(f1_score(labels_MG, predicted_MG, average="micro", zero_division=0)),
        macro=float(by_genre_G[present_G].mean()),
        weighted=float(np.average(by_genre_G, weights=labels_MG.sum(axis=0))),
    )


def genre_aps(labels_MG: NDArray[np.generic], scores_MG: NDArray[np.floating]) -> tuple[float, ...]:
    """Return the average precision of each genre; nan where no movie has it."""
    labels_MG = _checked(labels_MG, scores_MG)
    return tuple(
        float(average_precision_score(truth_M, score_M)) if truth_M.any() else math.nan
        for truth_M, score_M in zip(labels_MG.T, scores_MG.T, strict=True)
    )


def mean_ap(labels_MG: NDArray[np.generic], scores_MG: NDArray[np.floating]) -> float:
    """Return the mean average precision over the genres that a movie has; nan without any."""
    return mean_of(genre_aps(labels_MG, scores_MG))


def mean_of(aps: Sequence[float]) -> float:
    """Return the mean of what ``genre_aps`` found, nan left out; nan without any."""
    known = [ap for ap in aps if not math.isnan(ap)]
    return sum(known) / len(known) if known else math.nan


def micro_ap(labels_MG: NDArray[np.generic], scores_MG: NDArray[np.floating]) -> float:
    """Return the average precision over all pairs of movie and genre; nan without a positive."""
    labels_MG = _checked(labels_MG, scores_MG)
    if not labels_MG.any():
        return math.nan
    return float(average_precision_score(labels_MG.ravel(), scores_MG.ravel()))


def _checked(labels_MG: NDArray[np.generic], scores_MG: NDArray[np.floating]) -> NDArray[np.int64]:
    if labels_MG.ndim != 2 or labels_MG.shape != scores_MG.shape:
        raise ValueError(f"got labels {labels_MG.shape}, scores {scores_MG.shape}, want one [M, G]")
    return labels_MG.astype(np.int64)


def precision_at_recall(
    labels_MG: NDArray[np.generic],
    scores_MG: NDArray[np.floating],
    genres: Sequence[str],
    points: int = 21,
) -> list[tuple[str, float, float]]:
    """Return (genre, recall, precision) for a plot, at evenly spaced recalls from 0 to 1.

    The precision is the best that is reached at this recall or a higher one. Genres without a
    positive movie are left out.
    """
    labels_MG = _checked(labels_MG, scores_MG)
    wanted = np.linspace(0, 1, points)
    found = []
    for g in np.flatnonzero(labels_MG.any(axis=0)).tolist():
        curve = precision_recall_curve(labels_MG[:, g], scores_MG[:, g])
        precision, recall = (axis[:-1] for axis in curve[:2])  # the last point is of no movie
        best = np.maximum.accumulate(precision)[::-1]  # recall falls from 1 to 0
        at = best[np.searchsorted(recall[::-1], wanted, side="left")]
        found += [(genres[g], float(r), float(p)) for r, p in zip(wanted, at, strict=True)]
    return found
