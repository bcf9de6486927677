from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from configs.schema import DataConfig
from sharding.features import MovieFeatures, open_index, publish_feature_shard, seal_features
from sharding.label_files import labels_reader, read_labels, relabel
from sharding.labels import Fold, Labels, fold_split, make_labels, parse_fold
from sharding.storage.memory import MemoryStorage

GENRES = ("Drama", "Comedy", "War")


def ids(n: int) -> list[str]:
    return [f"tt{k:04d}" for k in range(n)]


@pytest.mark.parametrize("text", ["fold:0/2", "fold:4/5", "fold:09/10"])
def test_a_fold_is_read_from_its_words(text: str) -> None:
    number, of = text.removeprefix("fold:").split("/")
    assert parse_fold(text) == Fold(int(number), int(of))
    assert parse_fold("folds/split.json") is None


@pytest.mark.parametrize(
    "text", ["fold:5/5", "fold:0/1", "fold:-1/5", "fold:", "fold:1", "fold:a/b"]
)
def test_what_begins_like_a_fold_and_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"want fold:K/N with N from 2 and K from 0 to N-1"):
        parse_fold(text)


@given(st.integers(2, 7), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_every_labelled_movie_is_val_in_exactly_one_fold_whatever_their_order(
    of: int, seed: int, chance: object
) -> None:
    hot_MG = (np.random.default_rng(seed).random((60, 4)) < 0.5).astype(np.uint8)
    labelled = {m for m, hot in zip(ids(60), hot_MG, strict=True) if hot.any()}
    order = list(range(60))
    chance.shuffle(order)  # type: ignore[attr-defined]
    shuffled = [ids(60)[k] for k in order]
    seen: Counter[str] = Counter()
    for number in range(of):
        split = fold_split(ids(60), hot_MG, Fold(number, of))
        assert split == fold_split(shuffled, hot_MG[order], Fold(number, of))
        assert set(split) == labelled
        assert set(split.values()) == {"train", "val"}
        seen.update(movie for movie, name in split.items() if name == "val")
    assert seen == Counter(labelled)


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(2, 10))
def test_folds_share_genres_and_movies_alike(seed: int, of: int) -> None:
    generator = np.random.default_rng(seed)
    hot_MG = (generator.random((600, 12)) < generator.uniform(0.02, 0.3, 12)).astype(np.uint8)
    labelled = int(hot_MG.any(axis=1).sum())
    for number in range(of):
        split = fold_split(ids(600), hot_MG, Fold(number, of))
        val = np.array([split.get(movie) == "val" for movie in ids(600)])
        assert abs(val.sum() - labelled / of) <= 0.05 * 600
        assert np.abs(hot_MG[val].sum(axis=0) - hot_MG.sum(axis=0) / of).max() <= 0.05 * 600


def test_folds_are_as_alike_as_those_of_the_library() -> None:
    library = pytest.importorskip("iterstrat.ml_stratifiers", reason="no iterative-stratification")
    ours, theirs = [], []
    for seed in range(8):
        generator = np.random.default_rng(seed)
        hot_MG = (generator.random((500, 15)) < generator.uniform(0.01, 0.3, 15)).astype(np.uint8)
        hot_MG = hot_MG[hot_MG.any(axis=1)]
        movies = ids(len(hot_MG))
        for number in range(5):
            split = fold_split(movies, hot_MG, Fold(number, 5))
            ours.append(unlikeness(hot_MG, [split[movie] == "val" for movie in movies]))
        folds = library.MultilabelStratifiedKFold(5, shuffle=True, random_state=seed)
        for _, val in folds.split(movies, hot_MG):
            theirs.append(unlikeness(hot_MG, np.isin(np.arange(len(movies)), val)))
    assert np.mean(ours) <= 1.2 * np.mean(theirs)


def unlikeness(hot_MG: np.ndarray, val: object) -> float:
    """How many movies a genre of one of five folds is off its fifth, on average."""
    return float(np.abs(hot_MG[np.array(val)].sum(axis=0) - hot_MG.sum(axis=0) / 5).mean())


def test_folds_are_the_same_for_ever() -> None:
    hot_MG = np.eye(3, dtype=np.uint8)[np.arange(12) % 3]
    val = [
        sorted(m for m, name in fold_split(ids(12), hot_MG, Fold(k, 3)).items() if name == "val")
        for k in range(3)
    ]
    assert val == [
        ["tt0002", "tt0003", "tt0004", "tt0009"],
        ["tt0001", "tt0006", "tt0010", "tt0011"],
        ["tt0000", "tt0005", "tt0007", "tt0008"],
    ]


def test_more_folds_than_labelled_movies_are_refused() -> None:
    hot_MG = np.array([[1], [1], [0]], np.uint8)
    with pytest.raises(DataError, match="fold:0/3: got 2 labelled movies, too few for 3 folds"):
        fold_split(ids(3), hot_MG, Fold(0, 3))


def test_labels_may_be_split_by_a_fold(tmp_path: Path) -> None:
    table = tmp_path / "m.json"
    table.write_text(json.dumps({movie: ["War"] for movie in ids(10)}))
    data = DataConfig(root="r", metadata=str(table), split="fold:1/5", genres=GENRES)
    labels, findings = read_labels(data, [*ids(10), "unlabelled"])
    assert Counter(labels.split_M.tolist()) == {"train": 8, "val": 2, "": 1}
    assert (findings.unsplit, findings.split_absent) == ((), ())


def test_a_fold_that_is_none_is_told_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"got 'fold:5/5', want fold:K/N"):
        labels_reader(DataConfig(root="r", metadata="absent.json", split="fold:5/5"))


def test_a_movie_in_two_splits_is_told_before_anything_is_read(tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["tt0001"], "test": ["tt0001"]}))
    with pytest.raises(DataError, match="movie tt0001 is in 'train' and in 'test'"):
        labels_reader(DataConfig(root="r", metadata="absent.json", split=str(split)))


# --- relabel --------------------------------------------------------------------------------------


class Watched(MemoryStorage):
    """A storage that remembers what was touched."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: set[str] = set()

    def read(self, name: str) -> bytes:
        self.touched.add(name)
        return super().read(name)

    def open(self, name: str) -> BinaryIO:
        self.touched.add(name)
        return super().open(name)

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        self.touched.add(name)
        super().publish(name, data, replace=replace)


@pytest.fixture
def features() -> Watched:
    """Twelve sealed movies."""
    storage = Watched()
    rows, shots = np.ones((4, 2), np.float16), np.zeros(4, np.int32)
    films = [MovieFeatures(movie, rows, shots, 4) for movie in ids(12)]
    publish_feature_shard(storage, 0, films, made_from="test")

    def old_labels(movies: Sequence[str]) -> Labels:
        return make_labels(movies, GENRES, dict.fromkeys(movies, ("War",)))[0]

    provenance = {"import": {"from": "test"}, "dim": 2}
    seal_features(storage, n_shards=1, provenance=provenance, labels_for=old_labels)
    storage.touched.clear()
    return storage


def data_of(folder: Path, split: str | None) -> DataConfig:
    table = folder / "m.json"
    table.write_text(json.dumps({m: [GENRES[k % 3]] for k, m in enumerate(ids(12))}))
    return DataConfig(root="r", metadata=str(table), split=split, genres=GENRES)


@pytest.mark.parametrize("split", [None, "fold:0/3", "fold:2/3", "file"])
def test_relabel_touches_manifest_index_and_labels_and_no_tar(
    features: Watched, tmp_path: Path, split: str | None
) -> None:
    if split == "file":
        split = str(tmp_path / "split.json")
        Path(split).write_text(json.dumps({"train": ids(5), "test": ids(12)[5:]}))
    manifest, index = open_index(features)
    labels = relabel(features, data_of(tmp_path, split))
    assert features.touched == {"manifest.json", "index.npz", "labels.npz"}
    assert open_index(features)[0].digest == manifest.digest
    again = Labels.from_bytes(features.read("labels.npz"), "labels")
    assert again.digest == labels.digest
    wanted, _ = read_labels(data_of(tmp_path, split), index.movies)
    assert again.split_M.tolist() == wanted.split_M.tolist()


def test_relabel_gives_the_same_bytes_at_any_time(features: Watched, tmp_path: Path) -> None:
    first = relabel(features, data_of(tmp_path, "fold:0/3")).to_bytes()
    other = relabel(features, data_of(tmp_path, "fold:1/3")).to_bytes()
    assert relabel(features, data_of(tmp_path, "fold:0/3")).to_bytes() == first != other


def test_relabel_with_a_movie_in_two_splits_names_it_and_leaves_the_labels(
    features: Watched, tmp_path: Path
) -> None:
    before = features.read("labels.npz")
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ids(5), "val": ["tt0003"]}))
    with pytest.raises(DataError, match="movie tt0003 is in 'train' and in 'val'; keep it in one"):
        relabel(features, data_of(tmp_path, str(split)))
    assert features.read("labels.npz") == before
