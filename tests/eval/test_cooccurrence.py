"""Genres that occur together, labelled and predicted."""

from __future__ import annotations

import numpy as np

from eval.cooccurrence import Pair, count_together, given_first, most_different

LABELS = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
"""Drama, Romance, and a genre without a movie."""


def test_movies_with_both_genres_are_counted_and_the_diagonal_counts_each_genre() -> None:
    assert count_together(LABELS).tolist() == [[3, 2, 0], [2, 3, 0], [0, 0, 0]]
    assert count_together(LABELS > 0).tolist() == count_together(LABELS).tolist()


def test_a_row_is_the_share_of_its_movies_that_have_the_other_genre() -> None:
    labels = np.array([[1, 1], [1, 0], [1, 0], [1, 1]])
    assert given_first(count_together(labels)).tolist() == [[1, 0.5], [1, 1]]
    assert np.isnan(given_first(count_together(LABELS))[2]).all()


def test_the_pair_that_differs_most_is_found_and_equal_counts_have_none() -> None:
    labelled = count_together(LABELS)
    predicted = count_together(np.ones((4, 3)))
    assert most_different(labelled, predicted) == Pair(0, 2, labelled=0, predicted=4)
    # The diagonal is no pair.
    assert most_different(labelled, labelled + np.diag([5, 0, 0])) is None
