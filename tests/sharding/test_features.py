"""Feature shards, their index and their sealing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from sharding.features import (
    FeatureSet,
    MovieFeatures,
    feature_shard_done,
    open_features,
    open_index,
    publish_feature_shard,
    seal_features,
)
from sharding.format.encoding import sha256_hex
from sharding.format.names import MANIFEST
from sharding.labels import make_labels
from sharding.storage.base import Range, Storage
from sharding.storage.local import DiskStorage
from sharding.storage.memory import MemoryStorage
from sharding.verify import verify_features
from tests.sharding.feature_sets import DIM, GENRES, labels_for, make_features, movie_features
from tests.sharding.films import Killed, Mortal, check_golden


def rows_of(features: FeatureSet, movie: int) -> np.ndarray:
    rows_ND = np.empty((int(features.index.rows[movie]), features.dim), np.float16)
    start = Range(features.shard_file(movie), int(features.index.offset[movie]))
    features.storage.read_into([start], [rows_ND.reshape(-1).view(np.uint8).data])
    return rows_ND


def test_golden_bytes_of_a_feature_set() -> None:
    storage = MemoryStorage()
    make_features(storage, 4)
    for name in ("features-00001.tar", "index.npz", "labels.npz", "manifest.json"):
        check_golden(f"features/{name}", storage.read(name))


def test_the_index_locates_the_rows_of_every_movie(tmp_path: Path) -> None:
    make_features(DiskStorage(tmp_path))
    features = open_features(str(tmp_path))
    assert features.movie_ids == tuple(f"tt{k:07d}" for k in range(7))
    assert features.dim == DIM
    assert features.digest == sha256_hex((tmp_path / MANIFEST).read_bytes())
    assert features.labels.movies("train").tolist() == list(range(7))
    for movie in range(7):
        np.testing.assert_array_equal(rows_of(features, movie), movie_features(movie).features_ND)


def test_a_set_maps_each_movie_id_to_its_rows_and_shots(tmp_path: Path) -> None:
    make_features(DiskStorage(tmp_path))
    features = open_features(str(tmp_path))
    assert len(features) == 7
    assert list(features) == list(features.movie_ids)
    for number, movie_id in enumerate(features):
        rows, expected = features[movie_id], movie_features(number)
        assert rows.movie == movie_id
        assert [rows.features_ND.dtype.str, rows.shots_N.dtype.str] == ["<f2", "<i4"]
        np.testing.assert_array_equal(rows.features_ND, expected.features_ND)
        np.testing.assert_array_equal(rows.shots_N, expected.shots_N)


def test_an_unknown_movie_id_is_a_key_error_of_one_line_that_names_the_nearest(
    tmp_path: Path,
) -> None:
    make_features(DiskStorage(tmp_path))
    features = open_features(str(tmp_path))
    assert "tt0000003" in features
    assert "tt0000033" not in features
    with pytest.raises(KeyError) as error:
        features["tt0000033"]
    assert isinstance(error.value, DataError)
    assert str(error.value) == (f"{tmp_path}: no movie 'tt0000033'; did you mean 'tt0000003'?")
    with pytest.raises(DataError, match=r"no movie 'Vertigo'; want one of features\.movie_ids"):
        features["Vertigo"]


def test_the_repr_of_a_set_is_one_short_line(tmp_path: Path) -> None:
    make_features(DiskStorage(tmp_path))
    features = open_features(str(tmp_path))
    rows = sum(len(movie_features(number).features_ND) for number in range(7))
    assert repr(features) == (
        f"<FeatureSet '': 7 movies, {rows} rows of {DIM}, digest {features.digest[:12]}, "
        f"{tmp_path}>"
    )


def test_a_feature_build_killed_between_any_two_steps_never_counts_as_complete() -> None:
    uninterrupted = Mortal({}, 10_000)
    make_features(uninterrupted)
    for life in range(10_000 - uninterrupted.life):
        files: dict[str, bytes] = {}
        with pytest.raises(Killed):
            make_features(Mortal(files, life))
        with pytest.raises(DataError, match="not sealed"):
            open_index(Mortal(files, 0))
        make_features(Mortal(files, 10_000))
        assert files == uninterrupted.files


def test_a_feature_shard_of_another_input_is_refused_unless_replace_is_passed() -> None:
    storage = MemoryStorage()
    publish_feature_shard(storage, 0, [movie_features(1)], input_digest="a")
    assert feature_shard_done(storage, 0, "a")
    assert not feature_shard_done(storage, 1, "a")
    with pytest.raises(DataError, match="pass `--replace`"):
        feature_shard_done(storage, 0, "b")
    assert not feature_shard_done(storage, 0, "b", replace=True)


def seal(storage: Storage, n_shards: int, dim: int = DIM) -> None:
    seal_features(storage, n_shards=n_shards, provenance={"dim": dim}, labels_for=labels_for)


def test_an_incomplete_or_corrupt_feature_set_is_not_sealed() -> None:
    storage = MemoryStorage()
    for number in (1, 2, 4):
        publish_feature_shard(storage, number, [movie_features(number)], input_digest="a")
    with pytest.raises(DataError, match=r"2 of 5 feature shards are missing; .*--array=0,3"):
        seal(storage, 5)
    tar = bytearray(storage.files["features-00001.tar"])
    tar[700] ^= 1
    storage.files["features-00001.tar"] = bytes(tar)
    with pytest.raises(DataError, match="--array=0-1,3"):
        seal(storage, 5)
    assert MANIFEST not in storage.files
    assert not feature_shard_done(storage, 1, "a"), "a rerun must rebuild it"
    assert feature_shard_done(storage, 2, "a")


def test_rows_of_another_dimension_and_movies_in_two_shards_are_refused() -> None:
    storage = MemoryStorage()
    publish_feature_shard(storage, 0, [movie_features(1)], input_digest="a")
    with pytest.raises(DataError, match="tt0000001: got rows of 6 numbers, want 9"):
        seal(storage, 1, dim=9)
    publish_feature_shard(storage, 1, [movie_features(1)], input_digest="a")
    with pytest.raises(DataError, match="movie tt0000001 is stored twice"):
        seal(storage, 2)


@pytest.mark.parametrize(
    "movies",
    [
        [movie_features(2), movie_features(1)],
        [MovieFeatures("a", np.zeros((2, 3), np.float16), np.zeros(1, np.int32), 2)],
        [MovieFeatures("a", np.zeros((2, 3), np.float32), np.zeros(2, np.int32), 2)],
    ],
)
def test_invalid_arrays_publish_nothing(movies: list[MovieFeatures]) -> None:
    storage = MemoryStorage()
    with pytest.raises(ValueError, match="want"):
        publish_feature_shard(storage, 0, movies, input_digest="a")
    assert storage.names() == []


def test_a_movie_without_rows_is_kept() -> None:
    storage = MemoryStorage()
    empty = MovieFeatures("a", np.zeros((0, DIM), np.float16), np.zeros(0, np.int32), 3)
    publish_feature_shard(storage, 0, [empty], input_digest="a")
    manifest = seal_features(
        storage,
        n_shards=1,
        provenance={"dim": DIM},
        labels_for=lambda movies: make_labels(movies, GENRES, {}, {})[0],
    )
    assert (manifest.samples, verify_features(storage)) == (1, [])


def test_labels_of_other_movies_are_refused(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    make_features(storage)
    other = labels_for([f"tt{k:07d}" for k in range(1, 8)])
    storage.publish("labels.npz", other.to_bytes(), replace=True)
    with pytest.raises(DataError, match="made for other movies; run `movienet-shard relabel "):
        open_features(str(tmp_path))
