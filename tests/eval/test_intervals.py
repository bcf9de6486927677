from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from eval.intervals import (
    Interval,
    bootstrap,
    draw_weights,
    interval,
    weighted_average_precision,
)

cases = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.booleans(), min_size=n, max_size=n),
        # Few distinct scores, so that ties are common.
        st.lists(st.sampled_from([-1.5, 0.0, 0.25, 0.5, 3.0]), min_size=n, max_size=n),
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
    )
)


def reference(positive: NDArray[np.bool_], scores: NDArray[np.float64], weights: object) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(average_precision_score(positive, scores, sample_weight=weights))


@given(cases)
def test_the_vectorised_average_precision_equals_that_of_scikit_learn(
    case: tuple[list[bool], list[float], list[int]],
) -> None:
    positive, scores, weights = (np.array(column) for column in case)
    ours = weighted_average_precision(positive, scores, weights[None].astype(np.float64))[0]
    if not (positive & (weights > 0)).any():
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(reference(positive, scores, weights), abs=1e-9)


def test_a_draw_is_the_split_with_its_movies_repeated() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((30, 4)) < 0.4).astype(np.uint8)
    scores = rng.normal(size=(30, 4)).round(1)
    weights = draw_weights(30, 20, seed=3)
    draws = bootstrap(labels, scores, weights)
    for weight, genre_ap, micro in zip(weights, draws.genre_ap_RG, draws.micro_ap_R, strict=True):
        drawn = np.repeat(np.arange(30), weight)
        expected = [reference(labels[drawn, g] > 0, scores[drawn, g], None) for g in range(4)]
        assert genre_ap == pytest.approx(expected, abs=1e-9)
        pooled = reference(labels[drawn].ravel() > 0, scores[drawn].ravel(), None)
        assert micro == pytest.approx(pooled, abs=1e-9)
    assert draws.mean_ap_R == pytest.approx(draws.genre_ap_RG.mean(axis=1))


def test_every_draw_has_as_many_movies_as_the_split_and_depends_on_the_seed_only() -> None:
    weights = draw_weights(219, 50, seed=0)
    assert weights.shape == (50, 219)
    assert (weights.sum(axis=1) == 219).all()
    assert np.array_equal(weights, draw_weights(219, 50, seed=0))
    assert not np.array_equal(weights, draw_weights(219, 50, seed=1))
    # Frozen: raw words of Philox do not change with numpy.
    assert draw_weights(6, 3, seed=0).tolist() == [
        [1, 0, 1, 3, 0, 1],
        [1, 0, 1, 1, 2, 1],
        [1, 3, 0, 0, 1, 1],
    ]


def test_draws_split_into_chunks_give_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random((12, 3)) < 0.5).astype(np.uint8)
    scores, weights = rng.normal(size=(12, 3)), draw_weights(12, 17, seed=0)
    unchunked = bootstrap(labels, scores, weights)
    monkeypatch.setattr("eval.intervals._CHUNK_CELLS", 100)
    chunked = bootstrap(labels, scores, weights)
    assert np.array_equal(unchunked.genre_ap_RG, chunked.genre_ap_RG, equal_nan=True)
    assert np.array_equal(unchunked.micro_ap_R, chunked.micro_ap_R)


def test_a_genre_that_is_absent_from_a_draw_is_excluded_from_its_mean() -> None:
    labels = np.array([[1, 1], [0, 1]], np.uint8)
    scores = np.array([[0.0, 1.0], [1.0, 0.0]])
    draws = bootstrap(labels, scores, np.array([[0, 2], [1, 1]], np.uint16))
    assert np.isnan(draws.genre_ap_RG[0, 0])
    assert draws.mean_ap_R.tolist() == [1.0, 0.75]


def test_an_interval_is_centred_on_the_estimate_not_on_the_draws() -> None:
    draws = np.array([0.4, 0.5, 0.6, np.nan])  # standard deviation 0.1, and one unusable draw
    ends = interval(0.3, draws, movies=10_000, bounded=False)
    assert ends is not None
    assert (ends.low, ends.high) == pytest.approx((0.104, 0.496), abs=1e-4)


def test_an_interval_of_few_movies_is_longer_by_students_distribution() -> None:
    draws = np.array([0.4, 0.5, 0.6])
    for movies, quantile in ((10, 2.2622), (20, 2.0930), (220, 1.9709)):  # of tables, for M - 1
        ends = interval(0.3, draws, movies=movies, bounded=False)
        assert ends is not None
        assert (ends.high - 0.3) / 0.1 == pytest.approx(quantile, abs=5e-4)
    assert interval(0.3, draws, movies=1) is None


@given(
    st.floats(0.01, 0.99),
    st.lists(st.floats(0, 1), min_size=2, max_size=9),
)
def test_intervals_of_average_precision_contain_it_within_0_to_1_and_reach_further_towards_one_half(
    estimate: float, draws: list[float]
) -> None:
    ends = interval(estimate, np.array(draws), movies=50)
    assert ends is not None
    assert 0 <= ends.low <= estimate + 1e-12
    assert estimate - 1e-12 <= ends.high <= 1
    below, above = estimate - ends.low, ends.high - estimate
    assert (above >= below - 1e-9) if estimate < 0.5 else (below >= above - 1e-9)


def test_intervals_of_differences_are_not_bounded() -> None:
    ends = interval(0.0, np.array([-0.5, 0.5]), movies=10_000, bounded=False)
    assert ends is not None
    assert (ends.low, ends.high) == pytest.approx((-1.386, 1.386), abs=1e-3)


def test_no_draws_give_no_interval() -> None:
    draws = bootstrap(np.ones((3, 2), np.uint8), np.ones((3, 2)), draw_weights(3, 0, seed=0))
    assert interval(0.5, draws.mean_ap_R, movies=3) is None


def test_an_interval_covers_the_mean_over_splits_of_the_same_size_19_times_in_20() -> None:
    # Scores that separate by one standard deviation, on 200 independent splits of 100 movies.
    rng, once = np.random.default_rng(0), np.ones((1, 100), np.uint16)
    estimates, intervals = [], []
    for split in range(200):
        labels = (rng.random((100, 3)) < 0.3).astype(np.uint8)
        scores = rng.normal(size=(100, 3)) + labels
        estimates.append(float(bootstrap(labels, scores, once).mean_ap_R[0]))
        draws = bootstrap(labels, scores, draw_weights(100, 100, seed=split))
        intervals.append(interval(estimates[-1], draws.mean_ap_R, movies=100))
    truth = np.mean(estimates)
    covered = sum(one is not None and one.low <= truth <= one.high for one in intervals)
    assert 180 <= covered <= 198


def test_a_perfect_score_that_rounds_above_1_has_an_interval_that_ends_at_1() -> None:
    assert interval(1 + 2**-52, np.ones(10), movies=20) == Interval(1.0, 1.0)
