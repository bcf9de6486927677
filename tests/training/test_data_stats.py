"""What a model is told of the data comes from the train movies alone, each real row once."""

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
def test_statistics_are_those_of_the_middle_windows_of_these_movies(
    films: Any, movies: list[int]
) -> None:
    given = measure(films.features, np.array(movies), frames=6)
    middle = [films.rows[each][max(N_ROWS[each] - 6, 0) // 2 :][:6] for each in movies]
    rows = np.concatenate(middle).astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for moments, want in ((given.rows.raw, rows), (given.rows.unit, unit)):
        np.testing.assert_allclose(moments.mean_D.numpy(), want.mean(0), rtol=1e-5, atol=1e-6)
        assert moments.scale == pytest.approx((want - want.mean(0)).std())


def test_the_prior_is_the_share_of_these_movies(films: Any) -> None:
    # Movie i has genre i modulo 3, and Drama if i is a multiple of 4.
    given = measure(films.features, np.array([0, 1, 2, 4]), frames=6)
    assert given.prior.tolist() == [0.5, 0.5, 0.25]
