"""How far predicted probabilities agree with observed frequencies, computed from arrays.

All (movie, genre) pairs are pooled and divided into ten bins of equal width by their probability: a
bin contains its lower edge, the last one both. The expected calibration error (ECE) is the mean
over pairs of the distance, in their bin, between the mean probability and the share of pairs whose
movie has the genre. 0 is perfect. Ranking metrics such as AP ignore calibration.

Sources: Naeini, Cooper and Hauskrecht, Obtaining Well Calibrated Probabilities Using Bayesian
Binning, AAAI 2015 (ECE). Guo et al., On Calibration of Modern Neural Networks, ICML 2017. There the
probability is that of the top class; here it is that of each genre, as the genres are not
exclusive.

M = movies, G = genres
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs whose probability is in one interval."""

    low: float
    high: float
    pairs: int
    predicted: float
    """Mean probability."""

    observed: float
    """Share of the pairs whose movie has the genre."""


def reliability(
    labels_MG: NDArray[np.generic], probabilities_MG: NDArray[np.floating]
) -> tuple[Bin, ...]:
    """Return the bins that contain a pair, in ascending order.

    Args:
        labels_MG: 0 or 1.
        probabilities_MG: 0 to 1.
    """
    number_N = np.minimum((probabilities_MG.ravel() * BINS).astype(np.int64), BINS - 1)
    pairs, predicted, observed = (
        np.bincount(number_N, weights=weights, minlength=BINS)
        for weights in (None, probabilities_MG.ravel(), labels_MG.ravel())
    )
    return tuple(
        Bin(
            low=b / BINS,
            high=(b + 1) / BINS,
            pairs=int(pairs[b]),
            predicted=min(float(predicted[b] / pairs[b]), 1.0),
            observed=float(observed[b] / pairs[b]),
        )
        for b in np.flatnonzero(pairs).tolist()
    )


def expected_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error of the bins of ``reliability``, 0 to 1."""
    pairs = sum(one.pairs for one in bins)
    return sum(one.pairs * abs(one.predicted - one.observed) for one in bins) / max(pairs, 1)
