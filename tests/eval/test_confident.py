"""The most confident right and wrong films."""

from __future__ import annotations

import numpy as np

from eval.confident import Bar, most_confident


def test_films_are_ordered_by_their_most_probable_genre_and_divided_by_its_label() -> None:
    labels = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])
    scores = np.array([[0.6, 0.1], [0.9, 0.8], [0.2, 0.7], [0.3, 0.4]])
    assert [film.movie for film in most_confident(labels, scores, right=True)] == [2, 0]
    assert [film.movie for film in most_confident(labels, scores, right=False)] == [1, 3]


def test_a_genre_leads_at_most_two_films_of_a_list_and_a_list_has_at_most_six() -> None:
    scores = np.full((40, 10), 0.1)
    lead = np.arange(40) // 4
    scores[np.arange(40), lead] = 0.9 - 0.01 * np.arange(40)
    films = most_confident(np.ones((40, 10)), scores, right=True)
    assert [film.movie for film in films] == [0, 1, 4, 5, 8, 9]


def test_a_film_shows_its_five_most_probable_genres_and_all_that_it_has() -> None:
    labels = np.array([[1, 0, 0, 0, 0, 0, 0, 1]])
    (film,) = most_confident(
        labels, np.array([[0.9, 0.8, 0.7, 0.1, 0.5, 0.4, 0.3, 0.2]]), right=True
    )
    assert [bar.genre for bar in film.bars] == [0, 1, 2, 4, 5, 7]
    assert film.bars[-1] == Bar(7, 0.2, labelled=True)


def test_a_list_may_be_empty() -> None:
    assert most_confident(np.ones((2, 2)), np.full((2, 2), 0.5), right=False) == ()
    assert most_confident(np.ones((0, 2)), np.zeros((0, 2)), right=True) == ()
