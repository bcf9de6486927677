"""The probability threshold above which a genre is predicted, computed from arrays.

All genres share one threshold, which gives the best micro-F1. A threshold per genre overfits the
rare genres.

M = movies, G = genres, N = (movie, genre) pairs, by falling probability.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
