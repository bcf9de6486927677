"""Baselines for every model: the class prior, and a linear model on the mean row.

Both are fitted on the train split of the same feature set. On the published features the linear
model matches the best networks after one second of training, so it is a serious competitor.

M = movies, N = rows of a movie, D = feature size, G = genres
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MEAN_POOL_C = 0.75
"""Inverse strength of the L2 penalty, for means of mean squared length 1. Chosen by
cross-validation inside the train split of the published features, where the mAP is flat around it.
"""

_PRIOR_MOVIES = 1.0
"""Pseudo-count: one imagined movie that has half of each genre. Without it, a genre that is absent
from the train split would have a logit of -inf."""


@dataclass(frozen=True)
class ClassPrior:
    """Predictor that gives every movie the genre frequencies of the train split."""

    logits_G: NDArray[np.float64]

    @classmethod
    def fit(cls, labels_MG: NDArray[np.uint8]) -> ClassPrior:
        """Count the genres of the train movies, ``labels_MG`` uint8 0 or 1."""
        hits_G = labels_MG.sum(axis=0, dtype=np.float64) + _PRIOR_MOVIES / 2
        misses_G = len(labels_MG) + _PRIOR_MOVIES - hits_G
        return cls(np.log(hits_G / misses_G))

    def predict(self, n_movies: int) -> NDArray[np.float64]:
        """Return the same logits for each movie, float64 ``[M, G]``."""
        return np.tile(self.logits_G, (n_movies, 1))


@dataclass(frozen=True)
class MeanLinear:
    """Logistic regression per genre on a movie's mean row."""

    centre_D: NDArray[np.float64]
    scale: float
    weight_DG: NDArray[np.float64]
    bias_G: NDArray[np.float64]

    @classmethod
    def fit(
        cls, means_MD: NDArray[np.float32], labels_MG: NDArray[np.uint8], *, c: float = MEAN_POOL_C
    ) -> MeanLinear:
        """Fit each genre independently.

        The means are centred, then divided by one number for all dimensions so that their mean
        squared length is 1. One ``c`` therefore fits towers of any scale. A divisor per dimension
        costs accuracy. A genre that all or none of the train movies have gets its prior.

        Args:
            means_MD: ``mean_row`` of each train movie.
            labels_MG: Their genres, uint8 0 or 1.
            c: scikit-learn's C, the inverse strength of the penalty.
        """
        centre_D = means_MD.mean(axis=0, dtype=np.float64)
        centred_MD = means_MD - centre_D
        # Identical movies have scale 0.
        scale = float(np.sqrt((centred_MD**2).sum(axis=1).mean())) or 1.0
        weight_DG = np.zeros((means_MD.shape[1], labels_MG.shape[1]))
        bias_G = ClassPrior.fit(labels_MG).logits_G.copy()
        for genre, truth_M in enumerate(labels_MG.T):
            if truth_M.min() != truth_M.max():  # scikit-learn needs both classes
                fitted = _logistic(centred_MD / scale, truth_M, c)
                weight_DG[:, genre], bias_G[genre] = fitted.coef_[0], fitted.intercept_[0]
        return cls(centre_D, scale, weight_DG, bias_G)

    def predict(self, means_MD: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return logits, float64 ``[M, G]``."""
        logits_MG: NDArray[np.float64] = (means_MD - self.centre_D) / self.scale @ self.weight_DG
        return logits_MG + self.bias_G


def mean_row(rows_ND: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return the mean of a movie's L2-normalised rows, float32 ``[D]``; zeros if it has no row.

    Zero rows are padding and are ignored. Consecutive equal rows count once.
    """
    rows_ND = rows_ND.astype(np.float32)  # squares overflow in float16
    # Published features repeat rows to fill a fixed length; repeats would outweigh real frames.
    differs_N = np.append(True, (rows_ND[1:] != rows_ND[:-1]).any(axis=1))[: len(rows_ND)]
    norm_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    used_N = differs_N & (norm_N1[:, 0] > 0)
    if not used_N.any():
        return np.zeros(rows_ND.shape[1], np.float32)
    return np.asarray((rows_ND[used_N] / norm_N1[used_N]).mean(axis=0), dtype=np.float32)


def mean_rows(movies: Iterable[NDArray[np.float16]]) -> NDArray[np.float32]:
    """Return ``mean_row`` of each movie, float32 ``[M, D]``; one movie is in memory at a time."""
    return np.stack([mean_row(rows_ND) for rows_ND in movies])


def _logistic(inputs_MD: NDArray[np.float64], truth_M: NDArray[np.uint8], c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # A fit that stops slightly early ranks movies equally well.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=300).fit(inputs_MD, truth_M)
