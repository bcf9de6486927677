"""The shared threshold of all genres maximizes micro-F1."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import f1_score

from training.thresholds import global_threshold

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
