"""Sections of a report: decisions by each rule, curves, co-occurrence, films."""

from __future__ import annotations

import numpy as np
import pytest

from eval.predictions import Predictions
from eval.sections import (
    ALL_PAIRS,
    calibration,
    cooccurrence,
    curves,
    films,
    rules,
    threshold_row,
)

PREDICTIONS = Predictions(
    movie_id=["tt1", "tt2", "tt3", "tt4"],
    genres=["Drama", "War", "Musical"],
    labels_MG=np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]], np.uint8),
    probabilities_MG=np.array(
        [[0.9, 0.2, 0.1], [0.7, 0.3, 0.1], [0.8, 0.4, 0.1], [0.35, 0.1, 0.1]]
    ),
    thresholds_G=np.full(3, 0.5),
    split="val",
)
HALF, COMMON, PER_GENRE = rules(
    3, threshold=0.35, is_tuned=True, genre_thresholds=(0.35, 0.25, 0.35)
)


def test_a_model_is_decided_by_one_half_by_its_own_threshold_and_by_those_per_genre() -> None:
    rows = [threshold_row(PREDICTIONS, rule) for rule in (HALF, COMMON, PER_GENRE)]
    assert [row.threshold for row in rows] == [0.5, 0.35, None]
    assert [one.threshold for one in rows[2].genres] == [0.35, 0.25, 0.35]
    # Drama: 2 of 3 found, one false alarm; then 3 of 3. War: 0 of 2, then 1, then 2.
    assert [row.micro.recall for row in rows] == pytest.approx([2 / 5, 4 / 5, 1])
    assert [row.genres[1].f1 for row in rows] == pytest.approx([0, 2 / 3, 1])
    assert rows[2].micro.precision == pytest.approx(5 / 6)
    # Musical has no movie: it is left out of the macro average.
    assert rows[2].macro.f1 == pytest.approx((6 / 7 + 1) / 2)
    assert "tuned by cross-validation on the run's holdout" in rows[2].origin


def test_thresholds_per_genre_that_all_equal_the_common_one_state_that_none_improved_on_it() -> (
    None
):
    *_, equal = rules(2, threshold=0.3, is_tuned=True, genre_thresholds=(0.3, 0.3))
    assert equal.origin.endswith("none improved on the common one")
    assert "improved" not in PER_GENRE.origin


def test_a_model_without_a_holdout_has_no_thresholds_per_genre_and_one_half_appears_once() -> None:
    only = rules(3, threshold=0.5, is_tuned=False, genre_thresholds=None)
    assert [rule.origin for rule in only] == ["as in the published tables"]
    _, configured = rules(3, threshold=0.3, is_tuned=False, genre_thresholds=None)
    assert configured.origin == "training.threshold"


def test_curves_are_those_of_all_pairs_and_of_each_genre_with_a_movie() -> None:
    found = curves(PREDICTIONS)
    assert [one.name for one in found] == [ALL_PAIRS, "Drama", "War"]
    assert {len(one.precision) for one in found} == {21}
    assert set(found[2].precision) == {1.0}


def test_a_genre_with_the_name_of_the_pooled_curve_keeps_its_own_curve() -> None:
    one = np.ones((1, 1))
    hostile = Predictions(["tt1"], [ALL_PAIRS], one.astype(np.uint8), one, np.ones(1), "val")
    assert [len(one.precision) for one in curves(hostile)] == [21, 21]


def test_genres_occur_together_by_label_and_by_the_given_rule() -> None:
    counts = cooccurrence(PREDICTIONS, PER_GENRE)
    assert counts.labelled == ((3, 1, 0), (1, 2, 0), (0, 0, 0))
    assert counts.predicted == ((4, 2, 0), (2, 2, 0), (0, 0, 0))
    assert cooccurrence(PREDICTIONS, HALF).predicted[1] == (0, 0, 0)


def test_films_show_their_genres_with_probability_threshold_and_label() -> None:
    chosen = films(PREDICTIONS, PER_GENRE)
    assert [film.movie for film in chosen.right] == ["tt1", "tt2"]
    (wrong,) = chosen.wrong
    assert wrong.movie == "tt3"
    assert [(bar.genre, bar.labelled) for bar in wrong.bars] == [
        *(("Drama", False), ("War", True), ("Musical", False))
    ]
    assert (wrong.bars[1].probability, wrong.bars[1].threshold) == (0.4, 0.25)


def test_calibration_pools_all_pairs() -> None:
    section = calibration(PREDICTIONS)
    assert sum(one.pairs for one in section.bins) == 12
    assert 0 < section.error < 1
