"""Which genres occur together, in the labels and in the predictions, computed from arrays.

A model that scores each genre well on its own can still combine them wrongly, for example predict
Romance with every Drama. Metrics per genre do not show this.

M = movies, G = genres
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """Two genres, as columns, with the movies that have both."""

    first: int
    second: int
    labelled: int
    predicted: int


def count_together(hot_MG: NDArray[np.generic]) -> Counts:
    """Return how many movies have both genres, int64 ``[G, G]``; the diagonal counts each genre.

    Args:
        hot_MG: 0 or 1, or bool: labels, or predicted genres.
    """
    counted_MG: Counts = hot_MG.astype(np.int64)
    return np.asarray(counted_MG.T @ counted_MG)


def given_first(together_GG: Counts) -> NDArray[np.float64]:
    """Return the share of a row's movies that also have the column's genre, float64 ``[G, G]``.

    Rows of genres without a movie are nan.
    """
    movies_G1 = together_GG.diagonal()[:, None].astype(np.float64)
    movies_G1[movies_G1 == 0] = np.nan
    return np.asarray(together_GG / movies_G1)


def most_different(labelled_GG: Counts, predicted_GG: Counts) -> Pair | None:
    """Return the pair whose predicted count differs most from its labelled one; None if none."""
    difference_GG = np.triu(np.abs(predicted_GG - labelled_GG), k=1)
    if not difference_GG.any():
        return None
    first, second = np.unravel_index(difference_GG.argmax(), difference_GG.shape)
    cell = (int(first), int(second))
    return Pair(*cell, int(labelled_GG[cell]), int(predicted_GG[cell]))
