"""The films that a model is most confident about, right and wrong, computed from arrays.

The prediction of a film is its most probable genre, and the confidence is that probability. It is
right if the film has the genre. Each genre leads at most two films of a list, since a frequent
genre would otherwise fill it.

M = movies, G = genres
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FILMS = 6
"""Longest list."""

PER_GENRE = 2
BARS = 5
"""Most probable genres that are shown of a film; its labelled genres are added."""


@dataclass(frozen=True)
class Bar:
    """One genre of a film, as column."""

    genre: int
    probability: float
    labelled: bool


@dataclass(frozen=True)
class Film:
    """A film, as row, with the genres to show, by falling probability."""

    movie: int
    bars: tuple[Bar, ...]


def most_confident(
    labels_MG: NDArray[np.generic], probabilities_MG: NDArray[np.floating], *, right: bool
) -> tuple[Film, ...]:
    """Return the films with the most confident right, or wrong, prediction.

    Args:
        labels_MG: 0 or 1.
        probabilities_MG: 0 to 1.
        right: Which of the two lists.
    """
    top_M = probabilities_MG.argmax(axis=1)
    rows = np.arange(len(top_M))
    candidates = np.flatnonzero((labels_MG[rows, top_M] > 0) == right)
    confidence = probabilities_MG[candidates, top_M[candidates]]
    chosen: list[int] = []
    led: Counter[int] = Counter()
    for movie in candidates[np.argsort(-confidence, kind="stable")].tolist():
        genre = int(top_M[movie])
        if led[genre] < PER_GENRE and len(chosen) < FILMS:
            led[genre] += 1
            chosen.append(movie)
    return tuple(Film(one, _bars(labels_MG[one], probabilities_MG[one])) for one in chosen)


def _bars(labels_G: NDArray[np.generic], probabilities_G: NDArray[np.floating]) -> tuple[Bar, ...]:
    order = np.argsort(-probabilities_G, kind="stable").tolist()
    return tuple(
        Bar(genre, float(probabilities_G[genre]), bool(labels_G[genre]))
        for place, genre in enumerate(order)
        if place < BARS or labels_G[genre]
    )
