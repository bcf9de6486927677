"""Probability thresholds from which genres are predicted, tuned on the holdout of a run.

Both kinds are tuned by cross-validation over the movies of the holdout, which belongs to the train
split. The scored split is never involved.

- ``common``, one threshold for all genres: the mean over folds of the threshold that has the
  highest micro-F1 on the other folds. The mean depends less on single movies than one optimum.
- ``genres``, one per genre: the same mean of the highest F1 of the genre, pulled towards ``common``
  by the weight of ``pull`` imagined positive movies. Few positives would otherwise decide: a
  threshold per genre overfits rare genres. Cross-validation chooses ``pull``. A genre with fewer
  than ten positive movies keeps ``common``.

M = movies, G = genres, N = (movie, genre) pairs, by falling probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.metrics import decide

FOLDS = 5
MIN_POSITIVES = 10
"""Positive movies of the holdout below which a genre keeps the common threshold."""

_PULLS = (math.inf, 100.0, 30.0, 10.0)
"""Candidates of ``pull``, the strongest first: it wins a tie. With inf all genres share one. Weaker
ones raise macro-F1 further, but cost more micro-F1 (see the README)."""

Thresholds_G = NDArray[np.float64]


@dataclass(frozen=True)
class Thresholds:
    """Tuned thresholds; probabilities at or above them count as predicted."""

    common: float
    genres: tuple[float, ...]


def tune(labels_MG: NDArray[np.generic], probabilities_MG: NDArray[np.floating]) -> Thresholds:
    """Return thresholds tuned by cross-validation over movies.

    Args:
        labels_MG: 0 or 1.
        probabilities_MG: 0 to 1, of movies that the model was not trained on.
    """
    optima = [
        _optima(labels_MG[rest_M], probabilities_MG[rest_M]) for rest_M, _ in _folds(len(labels_MG))
    ]
    common = float(np.mean([one for one, _ in optima]))
    own_G = np.mean([own_G for _, own_G in optima], axis=0)
    support_G = labels_MG.sum(axis=0)
    pull = _best_pull(labels_MG, probabilities_MG, optima)
    return Thresholds(common, tuple(_pulled(common, own_G, support_G, pull).tolist()))


def global_threshold(
    labels_MG: NDArray[np.generic], probabilities_MG: NDArray[np.floating]
) -> float:
    """Return the threshold of the highest micro-F1, or 0.5 if no movie has a genre.

    Args:
        labels_MG: 0 or 1.
        probabilities_MG: 0 to 1, of movies that the model was not trained on.

    Returns:
        The midpoint between the last predicted pair and the first pair that is not predicted.
    """
    order_N = np.argsort(-probabilities_MG.ravel(), kind="stable")
    truth_N = labels_MG.ravel()[order_N].astype(np.int64)
    sorted_N = probabilities_MG.ravel()[order_N].astype(np.float64)
    if not truth_N.any():
        return 0.5
    next_N = np.append(sorted_N[1:], 0.0)
    # F1 if the first k pairs are predicted: 2 TP / (predicted + positive).
    f1_N = 2 * truth_N.cumsum() / (np.arange(1, len(truth_N) + 1) + truth_N.sum())
    f1_N[:-1][sorted_N[1:] == sorted_N[:-1]] = 0.0  # no threshold separates equal pairs
    best = int(f1_N.argmax())
    return float((sorted_N[best] + next_N[best]) / 2)


def _folds(n_movies: int) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Yield (other movies, movies of the fold), bool ``[M]``. A single movie is both."""
    fold_M = np.arange(n_movies) % FOLDS
    for fold in range(min(FOLDS, n_movies)):
        yield (fold_M != fold) | (n_movies == 1), fold_M == fold


def _optima(
    labels_MG: NDArray[np.generic], probabilities_MG: NDArray[np.floating]
) -> tuple[float, Thresholds_G]:
    columns = np.split(np.arange(labels_MG.shape[1]), labels_MG.shape[1])
    own = [global_threshold(labels_MG[:, g], probabilities_MG[:, g]) for g in columns]
    return global_threshold(labels_MG, probabilities_MG), np.array(own)


def _best_pull(
    labels_MG: NDArray[np.generic],
    probabilities_MG: NDArray[np.floating],
    optima: list[tuple[float, Thresholds_G]],
) -> float:
    """Return the pull of the highest macro-F1 on movies that the thresholds were not tuned on."""
    support_G = labels_MG.sum(axis=0)
    scores = []
    for pull in _PULLS:
        predicted_MG = np.zeros(labels_MG.shape, bool)
        for (_, fold_M), (common, own_G) in zip(_folds(len(labels_MG)), optima, strict=True):
            thresholds_G = _pulled(common, own_G, support_G, pull)
            predicted_MG[fold_M] = probabilities_MG[fold_M] >= thresholds_G
        scores.append(decide(labels_MG, predicted_MG).macro.f1)
    return _PULLS[int(np.argmax(scores))]


def _pulled(
    common: float, own_G: Thresholds_G, support_G: NDArray[np.int64], pull: float
) -> Thresholds_G:
    weight_G = np.where(support_G < MIN_POSITIVES, 0.0, support_G / (support_G + pull))
    return common + weight_G * (own_G - common)
