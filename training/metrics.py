"""Multi-label metrics of genre predictions, computed from arrays by scikit-learn.

M = movies, G = genres. The average precision of a genre without positive movies is nan, and means
exclude it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GenreMetrics:
    """Metrics of one genre."""

    genre: str
    precision: float
    """At the threshold; 0 if nothing is predicted."""

    recall: float
    """At the threshold; 0 if no movie has the genre."""

    ap: float
    """Average precision; nan if no movie has the genre."""

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
        probabilities_MG: 0 to 1. Genres of at least ``threshold`` are predicted.
        genres: Names, in the order of the columns.
        threshold: Shared by all genres.
    """
    labels_MG = _checked(labels_MG, probabilities_MG)
    # Not by scikit-learn, which sees a single column as two classes.
    decided = decide(labels_MG, probabilities_MG >= threshold).genres
    aps, support = genre_aps(labels_MG, probabilities_MG), labels_MG.sum(axis=0).tolist()
    return tuple(
        GenreMetrics(genre, one.precision, one.recall, ap, n)
        for genre, one, ap, n in zip(genres, decided, aps, support, strict=True)
    )


@dataclass(frozen=True)
class Decided:
    """Precision, recall and F1 of predicted genres; 0 where nothing is predicted or positive."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Decisions:
    """How good the predicted genres of some movies are."""

    micro: Decided
    """Over all (movie, genre) pairs."""

    macro: Decided
    """Mean over the genres with at least one movie."""

    weighted: Decided
    """Mean over genres weighted by support, the criterion of the published model selection."""

    genres: tuple[Decided, ...]
    """One per genre."""


def decide(labels_MG: NDArray[np.generic], predicted_MG: NDArray[np.bool_]) -> Decisions:
    """Return precision, recall and F1 of predictions, as scikit-learn defines them.

    Args:
        labels_MG: 0 or 1.
        predicted_MG: Whether a genre is predicted, e.g. ``probabilities_MG >= thresholds_G``.
    """
    labels_MG = _checked(labels_MG, predicted_MG)
    hits_G = (labels_MG & predicted_MG).sum(axis=0)
    predicted_G, support_G = predicted_MG.sum(axis=0), labels_MG.sum(axis=0)
    # [G, 3]: precision, recall, F1
    each_G3 = _ratios(hits_G, predicted_G, support_G)
    micro_3 = _ratios(hits_G.sum(), predicted_G.sum(), support_G.sum())
    # scikit-learn's own macro average would count genres without movies as 0.
    macro_3 = each_G3[support_G > 0].mean(axis=0) if support_G.any() else np.zeros(3)
    weighted_3 = support_G @ each_G3 / max(support_G.sum(), 1)
    micro, macro, weighted, *genres = (
        Decided(*row) for row in np.vstack([micro_3, macro_3, weighted_3, each_G3]).tolist()
    )
    return Decisions(micro, macro, weighted, tuple(genres))


def _ratios(hits: Any, predicted: Any, support: Any) -> NDArray[np.float64]:
    ratios = (hits, predicted), (hits, support), (2 * hits, predicted + support)
    return np.stack([over / np.maximum(under, 1) for over, under in ratios], axis=-1)


def genre_aps(labels_MG: NDArray[np.generic], scores_MG: NDArray[np.floating]) -> tuple[float, ...]:
    """Return the average precision of each genre; nan if no movie has it."""
    labels_MG = _checked(labels_MG, scores_MG)
    return tuple(
        _average_precision(truth_M, score_M) if truth_M.any() else math.nan
        for truth_M, score_M in zip(labels_MG.T, scores_MG.T, strict=True)
    )


def mean_ap(labels_MG: NDArray[np.generic], scores_MG: NDArray[np.floating]) -> float:
    """Return the mean average precision over genres with positives; nan without positives."""
    return mean_of(genre_aps(labels_MG, scores_MG))


def mean_of(aps: Sequence[float]) -> float:
    """Return the mean of the values of ``genre_aps`` that are not nan; nan if all are."""
    defined = [ap for ap in aps if not math.isnan(ap)]
    return sum(defined) / len(defined) if defined else math.nan


def micro_ap(labels_MG: NDArray[np.generic], scores_MG: NDArray[np.floating]) -> float:
    """Return the average precision over all (movie, genre) pairs; nan without positives."""
    labels_MG = _checked(labels_MG, scores_MG)
    if not labels_MG.any():
        return math.nan
    return _average_precision(labels_MG.ravel(), scores_MG.ravel())


def _average_precision(truth_M: NDArray[np.int64], score_M: NDArray[np.floating]) -> float:
    # Imported on use: it takes about a second, which delays the first step of a run.
    from sklearn.metrics import average_precision_score

    # The steps of recall of a perfect ranking may add up to slightly more than 1, e.g. 9 ninths.
    return min(float(average_precision_score(truth_M, score_M)), 1.0)


def _checked(labels_MG: NDArray[np.generic], scores_MG: NDArray[Any]) -> NDArray[np.int64]:
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

    The precision is the highest at this or any higher recall. Genres without positive movies are
    omitted.
    """
    from sklearn.metrics import precision_recall_curve

    labels_MG = _checked(labels_MG, scores_MG)
    recalls = np.linspace(0, 1, points)
    curve = []
    for g in np.flatnonzero(labels_MG.any(axis=0)).tolist():
        axes = precision_recall_curve(labels_MG[:, g], scores_MG[:, g])
        precision, recall = (axis[:-1] for axis in axes[:2])  # the last point is a convention
        best = np.maximum.accumulate(precision)[::-1]  # scikit-learn's recall falls from 1 to 0
        precisions = best[np.searchsorted(recall[::-1], recalls, side="left")]
        curve += [(genres[g], float(r), float(p)) for r, p in zip(recalls, precisions, strict=True)]
    return curve
