from __future__ import annotations

import json
import pickle
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from configs.errors import DataError
from sharding.format.names import movies_digest
from sharding.labels import (
    SPLITS,
    Labels,
    make_labels,
    read_genres,
    read_metadata,
    read_split,
    stratify,
)
from tests.damage import damaged, reads_or_reports
from tests.sharding.films import is_silent_or_one_line

GENRES = ("Drama", "Comedy", "War")


@st.composite
def hot_matrices(draw: st.DrawFn) -> np.ndarray:
    shape = (draw(st.integers(0, 60)), draw(st.integers(1, 25)))
    return draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 1)))


def ids(n: int) -> list[str]:
    return [f"tt{k:04d}" for k in range(n)]


@given(hot_matrices(), st.data())
def test_labels_round_trip_through_their_bytes(hot_MG: np.ndarray, data: st.DataObject) -> None:
    n, n_genres = hot_MG.shape
    names = st.lists(
        st.text(min_size=1, max_size=8).filter(lambda name: "\0" not in name),
        min_size=n_genres,
        max_size=n_genres,
    )
    split_M = np.array([SPLITS[k % 3] if k % 5 else "" for k in range(n)], dtype="U5")
    labels = Labels(tuple(data.draw(names)), hot_MG, split_M, movies_digest(ids(n)))
    read = Labels.from_bytes(labels.to_bytes(), "labels")
    assert read.genres == labels.genres
    np.testing.assert_array_equal(read.hot_MG, labels.hot_MG, strict=True)
    assert read.split_M.tolist() == labels.split_M.tolist()
    assert (read.movies_sha256, read.digest) == (labels.movies_sha256, labels.digest)


def test_labels_return_the_movies_of_a_split_and_refuse_an_empty_split() -> None:
    metadata = {"a": ["Drama"], "b": ["War"], "c": ["Drama", "War"]}
    labels, _ = make_labels(["a", "b", "c"], GENRES, metadata, {"a": "val", "c": "val"})
    assert labels.movies("val").tolist() == [0, 2]
    assert labels.movies("val").dtype == np.int64
    with pytest.raises(
        DataError, match="split 'test' has no labelled movie; there are: train 0, v"
    ):
        labels.movies("test")


def test_anomalies_of_labels_are_reported_without_an_error() -> None:
    metadata = {"a": ["Drama", "Noir"], "b": ["Noir"], "x": ["War"], "c": ["Comedy"], "n": []}
    split = {"a": "train", "b": "train", "y": "val"}
    labels, findings = make_labels(["a", "b", "c", "n", "u"], GENRES, metadata, split)
    assert labels.hot_MG.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert labels.split_M.tolist() == ["train", "", "", "", ""]
    assert findings.unlabelled == ("b", "n", "u")
    assert findings.unknown_genres == {"Noir": 2}
    assert (findings.absent, findings.split_absent) == (("x",), ("y",))
    assert findings.unsplit == ("c",)


# --- stratified -----------------------------------------------------------------------------------


@given(hot_matrices(), st.randoms(use_true_random=False))
def test_every_labelled_movie_is_in_one_split_in_any_order(hot_MG: np.ndarray, chance: Any) -> None:
    movies = ids(len(hot_MG))
    split = stratify(movies, hot_MG)
    assert set(split) == {m for m, hot in zip(movies, hot_MG, strict=True) if hot.any()}
    assert set(split.values()) <= set(SPLITS)
    order = list(range(len(movies)))
    chance.shuffle(order)
    shuffled = hot_MG[order] if order else hot_MG
    assert stratify([movies[k] for k in order], shuffled) == split


@given(st.lists(st.integers(0, 6), max_size=120))
def test_single_genre_movies_are_split_within_one_movie_of_the_exact_fraction(
    genre_of: list[int],
) -> None:
    hot_MG = np.zeros((len(genre_of), 7), np.uint8)
    hot_MG[np.arange(len(genre_of)), genre_of] = 1
    split = stratify(ids(len(genre_of)), hot_MG)
    of = dict(zip(ids(len(genre_of)), genre_of, strict=True))
    for genre, n in Counter(genre_of).items():
        got = Counter(split[movie] for movie in split if of[movie] == genre)
        for name, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
            assert abs(got[name] - share * n) <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(300, 1100))
def test_many_genres_are_split_within_a_few_movies_of_the_exact_fraction(seed: int, n: int) -> None:
    generator = np.random.default_rng(seed)
    hot_MG = (generator.random((n, 21)) < generator.uniform(0.01, 0.15, 21)).astype(np.uint8)
    movies = ids(n)
    split = stratify(movies, hot_MG)
    n_labelled = int(hot_MG.any(axis=1).sum())
    sides = np.array([split.get(movie, "") for movie in movies])
    for name, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
        assert abs((sides == name).sum() - share * n_labelled) <= 0.05 * n + 3
        expected = share * hot_MG.sum(axis=0)
        assert np.abs(hot_MG[sides == name].sum(axis=0) - expected).max() <= 0.05 * n + 3


def test_another_key_gives_another_split() -> None:
    hot_MG = np.ones((50, 1), np.uint8)
    assert stratify(ids(50), hot_MG) == stratify(ids(50), hot_MG)
    assert stratify(ids(50), hot_MG, key="1") != stratify(ids(50), hot_MG)


# --- parsing --------------------------------------------------------------------------------------


def test_metadata_is_read_from_json_and_pickle_in_every_form() -> None:
    expected = {"a": ("Drama", "War"), "x_b_20c": ("Comedy",), "n": ()}
    by_name = {"a": ["Drama", "War"], "b c": {"genres": ["Comedy"]}, "n": None}
    assert read_metadata(json.dumps(by_name).encode(), "m.json", GENRES) == expected
    multi_hot = {"a": [1, 0, 1], "b c": np.array([0.0, 1.0, 0.0]), "n": [0, 0, 0]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(multi_hot, protocol)
        assert read_metadata(data, "m.pkl", GENRES) == expected


@pytest.mark.parametrize(
    "value", [[1, 0], [1, 2, 0], ["Drama", 1], "Drama", 3, [[1, 0, 1]], {"genres": 4}]
)
def test_genres_that_are_neither_names_nor_multi_hot_are_refused_with_the_movie(
    value: object,
) -> None:
    with pytest.raises(DataError, match=r"^m\.json: a: got"):
        read_metadata(json.dumps({"a": value}).encode(), "m.json", GENRES)


def test_null_genres_are_no_labels() -> None:
    assert read_genres(b'{"imdb_id": "tt1", "genres": null}', "m") == ()
    assert read_genres(b'{"imdb_id": "tt1"}', "m") == ()
    assert read_genres(b'{"genres": ["War"]}', "m") == ("War",)
    for broken in (b"[]", b"{", b'{"genres": "War"}', b"\xff"):
        with pytest.raises(DataError, match=r"^m: "):
            read_genres(broken, "m")


def test_a_movie_in_two_splits_is_refused() -> None:
    with pytest.raises(DataError, match="movie a is in 'train' and in 'test'; keep it in one"):
        read_split(b'{"train": ["a", "b"], "test": ["a"]}', "s.json")
    assert read_split(b'{"train": ["a", "a"]}', "s.json") == {"a": "train"}


@pytest.mark.parametrize(
    "data", [b"[]", b"{}", b'{"train": "a"}', b'{"train": [1]}', b'{"dev": ["a"]}', b"x"]
)
def test_an_invalid_split_file_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^s\.json: "):
        read_split(data, "s.json")


@given(st.binary(max_size=300))
def test_corrupt_files_are_reported_in_one_line(data: bytes) -> None:
    for read in (read_split, read_genres, Labels.from_bytes):
        assert is_silent_or_one_line(partial(read, data, "m"))
    assert is_silent_or_one_line(partial(read_metadata, data, "m.json", GENRES))


@given(st.data())
def test_damaged_labels_metadata_and_splits_are_read_or_a_one_line_error(
    data: st.DataObject,
) -> None:
    genres = {"a": ["War"], "b": []}
    labels = make_labels(["a", "b"], GENRES, genres, {"a": "train"})[0].to_bytes()
    corrupt = data.draw(damaged(labels))
    assert reads_or_reports(partial(Labels.from_bytes, corrupt, "labels.npz"))
    metadata = data.draw(damaged(json.dumps({"a": ["War"], "b": {"genres": None}}).encode()))
    assert reads_or_reports(partial(read_metadata, metadata, "m.json", GENRES))
    split = data.draw(damaged(json.dumps({"train": ["a"], "val": ["b"]}).encode()))
    assert reads_or_reports(partial(read_split, split, "s.json"))


def test_metadata_is_read_from_a_table_of_movies_and_genres() -> None:
    want = {"bikes": ("Documentary", "War"), "x_My_20film": ("Drama",), "silence": ()}
    rows = "bikes,Documentary|War\nMy film, Drama \n\nsilence,\n"
    for text in (rows, "movie,genres\n" + rows, "\ufeffMovie,Genre\r\n" + rows):
        assert read_metadata(text.encode(), "labels.csv", GENRES) == want
    quoted = read_metadata(b'"One, two",Drama\n', "labels.csv", GENRES)
    assert list(quoted.values()) == [("Drama",)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"bikes,Drama,War\n", "line 1: got 3 columns, want two"),
        (b"movie,genres\nbikes\n", "line 2: got 1 columns, want two"),
        (b"bikes,Drama\nbikes,War\n", "two entries have the id bikes"),
        (b"bikes,\xff\n", "not CSV"),
        (b'bikes,"Drama\n', "not CSV"),
    ],
)
def test_a_corrupt_table_is_refused_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read_metadata(data, "labels.csv", GENRES)
    assert str(caught.value).startswith("labels.csv")
    assert "\n" not in str(caught.value)
