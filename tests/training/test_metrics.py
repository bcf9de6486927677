"""Metrics, compared with results computed by hand."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from training.metrics import (
    decide,
    genre_aps,
    genre_metrics,
    mean_ap,
    micro_ap,
    precision_at_recall,
)

LABELS = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], np.uint8)
SCORES = np.array([[0.9, 0.1, 0.2], [0.8, 0.2, 0.2], [0.6, 0.3, 0.1], [0.1, 0.4, 0.1]])
# First genre, by falling score: hit, miss, hit, miss -> (1/1 + 2/3) / 2.
# Second genre: miss, hit, hit, miss                  -> (1/2 + 2/3) / 2.
FIRST, SECOND = (1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2


def test_each_genre_has_its_precision_recall_ap_and_support() -> None:
    first, second, third = genre_metrics(LABELS, SCORES, ("Drama", "Comedy", "Western"))
    assert (first.genre, first.support) == ("Drama", 2)
    assert first.precision == pytest.approx(2 / 3)
    assert first.recall == 1.0
    assert first.ap == pytest.approx(FIRST)
    assert second.ap == pytest.approx(SECOND)
    assert (third.genre, third.support) == ("Western", 0)


def test_precision_without_predictions_is_0_and_ap_without_positives_is_nan() -> None:
    _, second, third = genre_metrics(LABELS, SCORES, ("Drama", "Comedy", "Western"))
    assert (second.precision, second.recall) == (0.0, 0.0)
    assert (third.precision, third.recall) == (0.0, 0.0)
    assert math.isnan(third.ap)


def test_scores_equal_to_the_threshold_are_predicted() -> None:
    first, *_ = genre_metrics(LABELS, SCORES, "abc", threshold=0.6)
    assert first.recall == 1.0


def test_the_mean_excludes_genres_without_movies() -> None:
    assert mean_ap(LABELS, SCORES) == pytest.approx((FIRST + SECOND) / 2)


def test_micro_ap_ranks_all_pairs_at_once() -> None:
    # 0.9 hit, 0.8 miss, 0.6 hit, 0.4 miss, 0.3 hit, then hit and two misses share 0.2.
    expected = (1 / 1 + 2 / 3 + 3 / 5 + 4 / 8) / 4
    assert micro_ap(LABELS, SCORES) == pytest.approx(expected)


def test_average_precision_without_positives_is_nan() -> None:
    negatives = np.zeros_like(LABELS)
    assert math.isnan(mean_ap(negatives, SCORES))
    assert math.isnan(micro_ap(negatives, SCORES))


def test_a_perfect_ranking_scores_1_and_never_more() -> None:
    # scikit-learn adds up the steps of recall: 21 times 1/21 is 1.0000000000000002.
    for n in range(1, 100):
        labels = np.repeat([1, 0], [n, 7])[:, None]
        scores = np.linspace(1, 0, n + 7)[:, None]
        assert mean_ap(labels, scores) <= 1.0
        assert micro_ap(labels, scores) == pytest.approx(1.0)
        assert micro_ap(labels, scores) <= 1.0


def test_arrays_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got labels \(4, 3\), scores \(4, 2\)"):
        mean_ap(LABELS, SCORES[:, :2])


def test_macro_averages_exclude_genres_without_movies() -> None:
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    scores = np.array([[0.9, 0.8, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.9]])
    made = decide(labels, scores >= 0.5)
    # Genre 0: 1 of 2 hit. Genre 1: 1 of 1 hit, 1 false alarm. Genre 2: no positive, 1 false alarm.
    assert made.micro.f1 == pytest.approx(2 * 2 / (4 + 3))
    assert made.macro.f1 == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert made.weighted.f1 == pytest.approx((2 * 2 / 3 + 2 / 3) / 3)
    assert (made.macro.precision, made.macro.recall) == (0.75, 0.75)
    assert decide(labels * 0, scores >= 0.5).macro.f1 == 0.0


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 4))


@pytest.mark.slow
@given(
    SHAPES.flatmap(lambda shape: arrays(np.int64, shape, elements=st.integers(0, 1))),
    st.data(),
)
def test_decisions_equal_those_of_scikit_learn_for_any_labels_even_without_positives(
    labels: np.ndarray, data: st.DataObject
) -> None:
    predicted = data.draw(arrays(np.bool_, labels.shape))
    made = decide(labels, predicted)
    # As lists of genres would be for scikit-learn, which sees a single column as one class.
    padded, guessed = (np.pad(array.astype(int), ((0, 0), (0, 1))) for array in (labels, predicted))
    present = [g for g in range(labels.shape[1]) if labels[:, g].any()]
    for average, ours in (("micro", made.micro), ("weighted", made.weighted)):
        theirs = precision_recall_fscore_support(
            padded, guessed, average=average, zero_division=0.0
        )[:3]
        assert astuple(ours) == pytest.approx(theirs, abs=1e-9)
    each = precision_recall_fscore_support(padded, guessed, average=None, zero_division=0.0)[:3]
    assert np.array([astuple(one) for one in made.genres]) == pytest.approx(
        np.transpose(each)[:-1], abs=1e-9
    )
    if present:
        theirs = precision_recall_fscore_support(
            padded, guessed, labels=present, average="macro", zero_division=0.0
        )[:3]
        assert astuple(made.macro) == pytest.approx(theirs, abs=1e-9)


@pytest.mark.slow
@given(
    SHAPES.flatmap(lambda shape: arrays(np.int64, shape, elements=st.integers(0, 1))),
    st.data(),
)
def test_average_precisions_equal_those_of_scikit_learn_also_with_ties_and_empty_genres(
    labels: np.ndarray, data: st.DataObject
) -> None:
    # Few distinct scores, so that ties are common.
    scores = data.draw(arrays(np.float64, labels.shape, elements=st.sampled_from([0, 0.3, 1])))
    theirs = [
        average_precision_score(truth, score) if truth.any() else math.nan
        for truth, score in zip(labels.T, scores.T, strict=True)
    ]
    assert genre_aps(labels, scores) == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    if labels.any():
        assert mean_ap(labels, scores) == pytest.approx(float(np.nanmean(theirs)), abs=1e-9)
        pooled = average_precision_score(labels.ravel(), scores.ravel())
        assert micro_ap(labels, scores) == pytest.approx(pooled, abs=1e-9)


@pytest.mark.slow
@given(
    SHAPES.flatmap(lambda shape: arrays(np.int64, shape, elements=st.integers(0, 1))),
    st.data(),
)
def test_the_metrics_of_a_genre_equal_those_of_scikit_learn_also_for_a_single_genre(
    labels: np.ndarray, data: st.DataObject
) -> None:
    scores = data.draw(arrays(np.float64, labels.shape, elements=st.sampled_from([0, 0.5, 1])))
    genres = [f"genre {g}" for g in range(labels.shape[1])]
    for g, one in enumerate(genre_metrics(labels, scores, genres)):
        truth, score = labels[:, g], scores[:, g]
        precision, recall, _, _ = precision_recall_fscore_support(
            truth, score >= 0.5, average="binary", zero_division=0.0
        )
        assert (one.genre, one.support) == (genres[g], truth.sum())
        assert (one.precision, one.recall) == pytest.approx((precision, recall), abs=1e-9)
        expected = average_precision_score(truth, score) if truth.any() else math.nan
        assert one.ap == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_a_curve_has_the_best_precision_at_each_recall_or_above() -> None:
    points = precision_at_recall(LABELS, SCORES, ("Drama", "Comedy", "Western"), points=3)
    # Drama: one hit of one, then two of three. Comedy: two of three is its best, for any recall.
    assert points == [
        ("Drama", 0.0, 1.0),
        ("Drama", 0.5, 1.0),
        ("Drama", 1.0, pytest.approx(2 / 3)),
        *(("Comedy", recall, pytest.approx(2 / 3)) for recall in (0.0, 0.5, 1.0)),
    ]
