"""The streaming search returns what sorting all rows would return."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from configs.errors import DataError
from eval.shot_search import BestShots, Hit, hits_of, plan_pieces, search
from sharding.features import (
    FeatureSet,
    MovieFeatures,
    open_feature_storage,
    publish_feature_shard,
    seal_features,
)
from sharding.labels import Labels, make_labels
from sharding.storage.memory import MemoryStorage

lengths = st.lists(st.integers(0, 12), max_size=8)


def make_set(
    movies: Sequence[NDArray[np.float16]], shots: Sequence[Sequence[int]], per_shard: int = 2
) -> FeatureSet:
    """Seal a set of movies in memory."""
    storage = MemoryStorage()
    n_shards = -(-len(movies) // per_shard)
    for shard in range(n_shards):
        publish_feature_shard(
            storage,
            shard,
            [
                MovieFeatures(f"tt{k:03d}", rows, np.array(shots[k], np.int32), len(rows))
                for k, rows in list(enumerate(movies))[shard * per_shard :][:per_shard]
            ],
            input_digest="test",
        )

    def labels(ids: Sequence[str]) -> Labels:
        genres = {movie: ["Drama"] for movie in ids}
        return make_labels(ids, ("Drama",), genres, dict.fromkeys(ids, "train"))[0]

    provenance = {"encoder": {"name": "test"}, "dim": movies[0].shape[1]}
    seal_features(storage, n_shards=n_shards, provenance=provenance, labels_for=labels)
    return open_feature_storage(storage)


def sorted_shots(
    similarity: Sequence[NDArray[np.float32]], shots: Sequence[Sequence[int]], top: int
) -> list[Hit]:
    """Sort all rows with numpy, and keep the first of each shot."""
    movie = np.repeat(np.arange(len(similarity)), [len(rows) for rows in similarity])
    row = np.concatenate([*(np.arange(len(rows)) for rows in similarity), np.empty(0, np.int64)])
    flat = np.concatenate([*similarity, np.empty(0, np.float32)])
    hits, seen = [], set()
    for place in np.argsort(-flat, kind="stable").tolist():
        film, number = int(movie[place]), int(row[place])
        shot = shots[film][number]
        key = (film, shot if shot >= 0 else ("row", number))
        if flat[place] > -np.inf and key not in seen:
            seen.add(key)
            hits.append(Hit(film, shot if shot >= 0 else None, number, float(flat[place])))
    return hits[:top]


@given(lengths, st.integers(1, 7))
def test_pieces_contain_each_row_once_in_order_and_all_but_the_last_are_full(
    rows: list[int], piece_rows: int
) -> None:
    pieces = list(plan_pieces(np.array(rows, np.int64), piece_rows))
    covered = [
        (span.movie, span.first + k)
        for piece in pieces
        for span in piece
        for k in range(span.n_rows)
    ]
    assert covered == [(movie, row) for movie, n in enumerate(rows) for row in range(n)]
    sizes = [sum(span.n_rows for span in piece) for piece in pieces]
    assert all(size == piece_rows for size in sizes[:-1])
    assert all(0 < size <= piece_rows for size in sizes)


@given(lengths, st.integers(1, 7), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_best_shots_of_all_pieces_are_those_of_sorting_all_rows(
    rows: list[int], piece_rows: int, top: int, random: object
) -> None:
    choice = random.choice  # type: ignore[attr-defined]
    # Few values, so that many similarities are equal; rows of -inf have none.
    values = [-np.inf, -0.5, 0.0, 0.25, 0.5]
    similarity = [np.array([choice(values) for _ in range(n)], np.float32) for n in rows]
    # Rows are in order of shots; -1: unknown.
    shots = [
        [-1] * n if choice([True, False]) else sorted(choice(range(5)) for _ in range(n))
        for n in rows
    ]

    def read_shots(movies: list[int]) -> list[NDArray[np.int32]]:
        return [np.array(shots[movie], np.int32) for movie in movies]

    best = BestShots(top)
    for spans in plan_pieces(np.array(rows, np.int64), piece_rows):
        piece = np.concatenate([similarity[s.movie][s.first :][: s.n_rows] for s in spans])
        best.add(hits_of(piece, spans, read_shots, floor=best.floor, top=top))
    assert best.hits == sorted_shots(similarity, shots, top)


def test_a_search_reads_all_rows_of_a_set_and_ranks_them_by_cosine() -> None:
    rng = np.random.default_rng(0)
    # The second movie is longer than a piece.
    movies = [rng.normal(size=(n, 256)).astype(np.float16) for n in (3, 9000, 40, 1, 700)]
    shots = [[0, 0, 1], sorted(rng.integers(0, 99, 9000).tolist()), [-1] * 40, [7], [5] * 700]
    vector = rng.normal(size=256).astype(np.float32)
    vector /= np.linalg.norm(vector)
    cosine = [
        (rows.astype(np.float32) @ vector / np.linalg.norm(rows.astype(np.float32), axis=1))
        for rows in movies
    ]
    found = search(make_set(movies, shots), vector, 30)
    want = sorted_shots(cosine, shots, 30)
    assert [(hit.movie, hit.shot, hit.row) for hit in found.hits] == [
        (hit.movie, hit.shot, hit.row) for hit in want
    ]
    assert [hit.similarity for hit in found.hits] == pytest.approx(
        [hit.similarity for hit in want], abs=1e-5
    )
    assert (found.rows, found.skipped) == (9744, 0)


def test_zero_rows_and_rows_with_nan_are_skipped_and_counted() -> None:
    rows = np.array([[0, 0], [np.nan, 1], [np.inf, 1], [-1, 0], [60000, 60000]], np.float16)
    found = search(make_set([rows], [[0, 1, 2, 3, 4]]), np.array([1, 0], np.float32), 9)
    assert [hit.row for hit in found.hits] == [4, 3]
    assert found.hits[0].similarity == pytest.approx(0.5**0.5)
    assert (found.rows, found.skipped) == (5, 3)


def test_of_equal_shots_the_first_in_the_order_of_the_set_is_first() -> None:
    rows = np.tile(np.array([[0.3, -0.7, 0.1]], np.float16), (700, 1))
    vector = np.array([0.6, 0.8, 0], np.float32)
    found = search(make_set([rows, rows, rows], [range(700)] * 3), vector, 1000)
    assert [(hit.movie, hit.row) for hit in found.hits] == [
        divmod(place, 700) for place in range(1000)
    ]


def test_memory_does_not_depend_on_the_size_of_the_set() -> None:
    movies = [np.ones((20_000, 512), np.float16)] * 4  # 82 MB
    features = make_set(movies, [[-1] * 20_000] * 4)
    vector = np.full(512, 512**-0.5, np.float32)
    tracemalloc.start()
    try:
        search(features, vector, 5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6


def test_a_truncated_shard_is_one_line() -> None:
    features = make_set([np.ones((3000, 512), np.float16)], [[0] * 3000])
    name = features.shard_file(0)
    features.storage.publish(name, features.storage.read(name)[:100_000], replace=True)
    with pytest.raises(DataError, match="truncated"):
        search(features, np.ones(512, np.float32), 5)
