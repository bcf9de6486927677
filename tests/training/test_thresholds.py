"""Thresholds maximize F1 on the holdout, and those of rare genres follow the common one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import f1_score

from training.metrics import decide
from training.thresholds import global_threshold, tune

SHAPE = (6, 3)


def micro_f1(labels: np.ndarray, scores: np.ndarray, threshold: float) -> float:
    return float(f1_score(labels.ravel(), scores.ravel() >= threshold, zero_division=0))


@given(
    labels=arrays(np.int64, SHAPE, elements=st.integers(0, 1)).filter(lambda a: a.any()),
    steps=arrays(np.int64, SHAPE, elements=st.integers(0, 20)),
)
def test_no_threshold_has_a_higher_micro_f1(labels: np.ndarray, steps: np.ndarray) -> None:
    scores = steps / 20
    best = micro_f1(labels, scores, global_threshold(labels, scores))
    assert best >= max(micro_f1(labels, scores, edge) for edge in np.unique(scores)) - 1e-12


def test_the_threshold_is_midway_between_predicted_and_other_pairs() -> None:
    labels = np.array([[1, 0], [1, 0]])
    assert global_threshold(labels, np.array([[0.9, 0.2], [0.6, 0.1]])) == 0.4


def test_the_threshold_without_positives_is_one_half() -> None:
    assert global_threshold(np.zeros((2, 2)), np.full((2, 2), 0.3)) == 0.5


def movies(seed: int, n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Two frequent genres whose best thresholds differ (0.7 and 0.2), and one of three movies."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((n, 3), np.int64)
    labels[:, :2] = rng.random((n, 2)) < 0.4
    labels[rng.choice(n, 3, replace=False), 2] = 1
    low, high = (np.array([0.5, 0.05, 0.3]), np.array([0.75, 0.25, 0.9]))
    scores = np.where(labels, high, low) + rng.normal(size=(n, 3)) * 0.08
    return labels, scores.clip(0, 1)


def test_frequent_genres_get_their_own_threshold_and_rare_ones_keep_the_common_one() -> None:
    tuned = tune(*movies(0))
    frequent, other, rare = tuned.genres
    assert 0.55 < frequent < 0.7
    assert 0.12 < other < 0.3
    assert rare == tuned.common


def test_thresholds_per_genre_are_better_than_the_common_one_on_movies_not_used_for_tuning() -> (
    None
):
    tuned, (labels, scores) = tune(*movies(0)), movies(1)
    per_genre = decide(labels, scores >= np.array(tuned.genres)).macro.f1
    assert per_genre > decide(labels, scores >= tuned.common).macro.f1 + 0.05


@given(
    n=st.integers(1, 7),
    positives=st.integers(0, 7),
)
def test_any_number_of_movies_has_thresholds_even_one_or_none_with_a_genre(
    n: int, positives: int
) -> None:
    labels = (np.arange(n) < positives).astype(np.int64)[:, None].repeat(2, axis=1)
    tuned = tune(labels, np.linspace(0.9, 0.1, n)[:, None].repeat(2, axis=1))
    assert 0 <= tuned.common <= 1
    assert tuned.genres == (tuned.common, tuned.common)
