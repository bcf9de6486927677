"""The one probability from which a genre is predicted; from arrays alone.

One threshold for all genres gives the best micro-F1: one a genre overfits the rare ones.

M = movies, G = genres, N = their pairs, from the surest on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def global_threshold(
    labels_MG: NDArray[np.generic], probabilities_MG: NDArray[np.floating]
) -> float:
    """Return the threshold of the highest micro-F1; 0.5 where no movie has a genre.

    Args:
        labels_MG: 0 or 1.
        probabilities_MG: 0 to 1, of movies that the model was not trained on.

    Returns:
        Halfway between the last pair that it predicts and the first that it does not.
    """
    order_N = np.argsort(-probabilities_MG.ravel(), kind="stable")
    truth_N = labels_MG.ravel()[order_N].astype(np.int64)
    surest_N = probabilities_MG.ravel()[order_N].astype(np.float64)
    if not truth_N.any():
        return 0.5
    below_N = np.append(surest_N[1:], 0.0)
    f1_N = 2 * truth_N.cumsum() / (np.arange(1, len(truth_N) + 1) + truth_N.sum())
    f1_N[:-1][surest_N[1:] == surest_N[:-1]] = 0.0  # equal pairs are predicted together
    best = int(f1_N.argmax())
    return float((surest_N[best] + below_N[best]) / 2)
