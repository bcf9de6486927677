"""Statistics of the data come from the train movies only, with each real row counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from training.data_stats import measure

N_ROWS = [3, 9, 5, 4, 12, 6]


@pytest.fixture(scope="module")
def films(make_films: Callable[..., Any]) -> Any:
    return make_films(N_ROWS)


@pytest.mark.parametrize("movies", [[0, 2, 3], [1, 4], range(6)])
def test_moments_are_those_of_the_middle_windows_of_the_movies(
    films: Any, movies: list[int]
) -> None:
    data_stats = measure(films.features, np.array(movies), frames=6)
    middle = [films.rows[each][max(N_ROWS[each] - 6, 0) // 2 :][:6] for each in movies]
    rows = np.concatenate(middle).astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for moments, want in ((data_stats.rows.raw, rows), (data_stats.rows.unit, unit)):
        np.testing.assert_allclose(moments.mean_D.numpy(), want.mean(0), rtol=1e-5, atol=1e-6)
        assert moments.scale == pytest.approx((want - want.mean(0)).std())


def test_the_prior_is_the_share_of_the_movies_with_each_genre(films: Any) -> None:
    # Movie i has genre i modulo 3, and Drama if i is a multiple of 4.
    data_stats = measure(films.features, np.array([0, 1, 2, 4]), frames=6)
    assert data_stats.prior.tolist() == [0.5, 0.5, 0.25]
