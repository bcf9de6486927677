from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from configs.errors import ConfigError, DataError
from configs.schema import DataConfig
from sharding.features import MovieFeatures, open_index, publish_feature_shard, seal_features
from sharding.label_files import labels_reader, read_labels, relabel, warn_of_differences
from sharding.labels import Labels, make_labels
from sharding.storage.memory import MemoryStorage

GENRES = ("Drama", "Comedy", "War")


def test_labels_are_read_from_a_folder_of_metadata(tmp_path: Path) -> None:
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "a.json").write_text('{"genres": ["War"]}')
    (meta / "b c.json").write_text('{"genres": null}')
    (meta / "other.json").write_text("not JSON, but not a movie of the set")
    (tmp_path / "split.json").write_text('{"train": ["a", "b c"]}')
    data = DataConfig(
        root="r", metadata=str(meta), split=str(tmp_path / "split.json"), genres=GENRES
    )
    labels, findings = read_labels(data, ["a", "x_b_20c"])
    assert labels.hot_MG.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert labels.split_M.tolist() == ["train", ""]
    assert (findings.unlabelled, findings.absent) == (("x_b_20c",), ("other",))


def test_anomalies_are_logged_by_count_and_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "m.json"
    table.write_text(json.dumps({f"m{k}": ["Noir"] for k in range(9)}))
    labels_for = labels_reader(DataConfig(root="r", metadata=str(table), genres=GENRES))
    labels_for(["m0", "m1"])
    assert "2 movies without a genre of the vocabulary: m0, m1" in caplog.text
    assert "7 movies of the metadata without data: m2, m3, m4, m5, m6, …" in caplog.text
    assert "1 genres outside the vocabulary: Noir (2 movies)" in caplog.text


@pytest.mark.parametrize("metadata", [None, "absent.json", "absent", __file__])
def test_missing_metadata_is_reported_with_its_key_before_any_movie_is_written(
    metadata: str | None,
) -> None:
    data = DataConfig(root="r", metadata=metadata)
    with pytest.raises(ConfigError, match=r"data\.metadata: got"):
        labels_reader(data)


def test_a_missing_split_file_is_reported_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{}")
    data = DataConfig(root="r", metadata=str(tmp_path / "m.json"), split="none.json")
    with pytest.raises(ConfigError, match=r"data\.split: no file none\.json"):
        read_labels(data, ["a"])


def ids(n: int) -> list[str]:
    return [f"tt{k:04d}" for k in range(n)]


def test_labels_can_be_split_by_a_fold(tmp_path: Path) -> None:
    table = tmp_path / "m.json"
    table.write_text(json.dumps({movie: ["War"] for movie in ids(10)}))
    data = DataConfig(root="r", metadata=str(table), split="fold:1/5", genres=GENRES)
    labels, findings = read_labels(data, [*ids(10), "unlabelled"])
    assert Counter(labels.split_M.tolist()) == {"train": 8, "val": 2, "": 1}
    assert (findings.unsplit, findings.split_absent) == ((), ())


def test_an_invalid_fold_is_reported_before_any_file_is_read() -> None:
    with pytest.raises(ConfigError, match=r"got 'fold:5/5', want fold:K/N"):
        labels_reader(DataConfig(root="r", metadata="absent.json", split="fold:5/5"))


def test_a_movie_in_two_splits_is_reported_before_metadata_is_read(tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["tt0001"], "test": ["tt0001"]}))
    with pytest.raises(DataError, match="movie tt0001 is in 'train' and in 'test'"):
        labels_reader(DataConfig(root="r", metadata="absent.json", split=str(split)))


class Recording(MemoryStorage):
    """Storage that records the names of accessed files."""

    def __init__(self) -> None:
        super().__init__()
        self.accessed: set[str] = set()

    def read(self, name: str) -> bytes:
        self.accessed.add(name)
        return super().read(name)

    def open(self, name: str) -> BinaryIO:
        self.accessed.add(name)
        return super().open(name)

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        self.accessed.add(name)
        super().publish(name, data, replace=replace)


@pytest.fixture
def features() -> Recording:
    """Storage of a sealed feature set of twelve movies."""
    storage = Recording()
    rows, shots = np.ones((4, 2), np.float16), np.zeros(4, np.int32)
    films = [MovieFeatures(movie, rows, shots, 4) for movie in ids(12)]
    publish_feature_shard(storage, 0, films, input_digest="test")

    def old_labels(movies: Sequence[str]) -> Labels:
        return make_labels(movies, GENRES, dict.fromkeys(movies, ("War",)))[0]

    provenance = {"import": {"from": "test"}, "dim": 2}
    seal_features(storage, n_shards=1, provenance=provenance, labels_for=old_labels)
    storage.accessed.clear()
    return storage


def data_of(folder: Path, split: str | None) -> DataConfig:
    table = folder / "m.json"
    table.write_text(json.dumps({m: [GENRES[k % 3]] for k, m in enumerate(ids(12))}))
    return DataConfig(root="r", metadata=str(table), split=split, genres=GENRES)


@pytest.mark.parametrize("split", [None, "fold:0/3", "fold:2/3", "file"])
def test_relabel_accesses_manifest_index_and_labels_but_no_tar(
    features: Recording, tmp_path: Path, split: str | None
) -> None:
    if split == "file":
        split = str(tmp_path / "split.json")
        Path(split).write_text(json.dumps({"train": ids(5), "test": ids(12)[5:]}))
    manifest, index = open_index(features)
    labels = relabel(features, data_of(tmp_path, split))
    assert features.accessed == {"manifest.json", "index.npz", "labels.npz"}
    assert open_index(features)[0].digest == manifest.digest
    stored = Labels.from_bytes(features.read("labels.npz"), "labels")
    assert stored.digest == labels.digest
    expected, _ = read_labels(data_of(tmp_path, split), index.movies)
    assert stored.split_M.tolist() == expected.split_M.tolist()


def test_other_labels_and_excluded_movies_are_reported_where_the_files_are_readable(
    features: Recording, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(data: DataConfig) -> str:
        caplog.clear()
        warn_of_differences(data, labels, index.movies, features.location)
        return caplog.text

    index, data = open_index(features)[1], data_of(tmp_path, "fold:0/3")
    labels = relabel(features, data)
    assert warnings(data) == ""
    assert "relabel --features" in warnings(data_of(tmp_path, "fold:1/3"))
    assert "contains 1 movies of data.exclude (" in warnings(
        data.model_copy(update={"exclude": (ids(12)[3], "elsewhere")})
    )
    for metadata in (None, str(tmp_path / "absent.json")):
        assert warnings(data.model_copy(update={"metadata": metadata})) == ""


def test_relabel_is_deterministic(features: Recording, tmp_path: Path) -> None:
    first = relabel(features, data_of(tmp_path, "fold:0/3")).to_bytes()
    other = relabel(features, data_of(tmp_path, "fold:1/3")).to_bytes()
    assert relabel(features, data_of(tmp_path, "fold:0/3")).to_bytes() == first != other


def test_relabel_with_a_movie_in_two_splits_reports_it_and_leaves_the_labels_unchanged(
    features: Recording, tmp_path: Path
) -> None:
    before = features.read("labels.npz")
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ids(5), "val": ["tt0003"]}))
    with pytest.raises(DataError, match="movie tt0003 is in 'train' and in 'val'; keep it in one"):
        relabel(features, data_of(tmp_path, str(split)))
    assert features.read("labels.npz") == before
