from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders.batching import plan_batches, rows_of_movies


@given(st.integers(0, 5000), st.integers(1, 300))
def test_every_frame_is_in_exactly_one_batch_in_order(n_frames: int, batch_size: int) -> None:
    batches = plan_batches(n_frames, batch_size)
    assert [frame for batch in batches for frame in batch] == list(range(n_frames))


@given(st.integers(0, 5000), st.integers(1, 300))
def test_all_batches_but_the_last_are_full(n_frames: int, batch_size: int) -> None:
    batches = plan_batches(n_frames, batch_size)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(1 <= len(batch) <= batch_size for batch in batches)


def test_a_batch_may_contain_frames_of_several_movies() -> None:
    assert plan_batches(10, 4) == (range(4), range(4, 8), range(8, 10))


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="batches of 0"):
        plan_batches(3, 0)


@given(st.lists(st.integers(0, 9), max_size=20))
def test_every_movie_gets_its_own_rows_in_order(frames_of_movies: list[int]) -> None:
    movie_F = np.repeat(np.arange(len(frames_of_movies), dtype=np.uint32), frames_of_movies)
    rows = rows_of_movies(movie_F, len(frames_of_movies))
    assert [rows[m].stop - rows[m].start for m in range(len(rows))] == frames_of_movies
    assert all((movie_F[rows[m]] == m).all() for m in range(len(rows)))


@pytest.mark.parametrize("movies", [[0, 1, 0], [0, 3]])
def test_movies_out_of_order_or_unknown_are_refused(movies: list[int]) -> None:
    with pytest.raises(ValueError, match="not in order"):
        rows_of_movies(np.array(movies, np.uint32), 2)
