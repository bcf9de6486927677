"""Calibration: bins, and an error that equals a direct computation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.calibration import calibration_curve

from eval.calibration import BINS, expected_error, reliability

SHAPE = (9, 3)


def test_the_error_is_the_mean_distance_of_probability_and_frequency_weighted_by_pairs() -> None:
    labels = np.array([[1], [0], [1], [1]])
    first, second = reliability(labels, np.array([[0.12], [0.18], [0.92], [1.0]]))
    assert (first.low, first.high, first.pairs) == (0.1, 0.2, 2)
    assert [first.predicted, first.observed] == pytest.approx([0.15, 0.5])
    assert (second.low, second.high, second.pairs, second.observed) == (0.9, 1.0, 2, 1.0)
    error = expected_error([first, second])
    assert error == pytest.approx((2 * (0.5 - 0.15) + 2 * (1 - 0.96)) / 4)


def test_probabilities_that_are_frequencies_have_no_error() -> None:
    labels = np.repeat([[1], [0]], [3, 7], axis=0)
    assert expected_error(reliability(labels, np.full((10, 1), 0.3))) == pytest.approx(0)


def test_the_lower_edge_belongs_to_a_bin_and_one_to_the_last() -> None:
    bins = reliability(np.zeros((4, 1)), np.array([[0.0], [0.5], [0.55], [1.0]]))
    assert [(one.low, one.pairs) for one in bins] == [(0.0, 1), (0.5, 2), (0.9, 1)]


@given(
    arrays(np.int64, SHAPE, elements=st.integers(0, 1)),
    # Not on an edge, which scikit-learn assigns to the bin below.
    arrays(np.float64, SHAPE, elements=st.floats(0, 1).map(lambda p: (p * 98 + 1) / 100 + 1e-4)),
)
def test_bins_and_error_equal_those_of_scikit_learn(
    labels: np.ndarray, probabilities: np.ndarray
) -> None:
    bins = reliability(labels, probabilities)
    observed, predicted = calibration_curve(labels.ravel(), probabilities.ravel(), n_bins=BINS)
    assert [one.observed for one in bins] == pytest.approx(observed, abs=1e-9)
    assert [one.predicted for one in bins] == pytest.approx(predicted, abs=1e-9)
    shares = np.array([one.pairs for one in bins]) / labels.size
    assert expected_error(bins) == pytest.approx(
        float(shares @ np.abs(observed - predicted)), abs=1e-9
    )


def test_no_movies_have_no_bins_and_no_error() -> None:
    assert reliability(np.zeros((0, 3)), np.zeros((0, 3))) == ()
    assert expected_error(()) == 0
