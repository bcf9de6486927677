"""Train, holdout and monitored split are disjoint, and stable when the dataset changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.errors import ConfigError, DataError
from configs.schema import TrainingConfig
from sharding.features import FeatureSet
from tests.training.conftest import MakeFilms
from training.split_selection import choose_movies, hold_out, split_movies


def test_a_movie_stays_in_the_holdout_when_others_leave() -> None:
    ids = [f"tt{number}" for number in range(200)]
    held = hold_out(ids, 0.1, seed=0)
    assert held.sum() == 20
    assert (held != hold_out(ids, 0.1, seed=1)).any()
    train = [movie for movie, out in zip(ids, held, strict=True) if not out]
    holdout = [movie for movie, out in zip(ids, held, strict=True) if out]
    reduced = hold_out([*holdout, *train[:90]], 20 / 110, seed=0)
    assert reduced.tolist() == [True] * 20 + [False] * 90


def test_a_holdout_of_0_is_empty() -> None:
    assert not hold_out(["a", "b"], 0.0, seed=0).any()


def with_split(features: FeatureSet, split: Sequence[str]) -> FeatureSet:
    return replace(features, labels=replace(features.labels, split_M=np.array(split, "U5")))


def test_movies_without_rows_are_skipped_with_one_warning(
    make_films: MakeFilms, caplog: pytest.LogCaptureFixture
) -> None:
    features = make_films([3, 0, 5, 0]).features
    assert split_movies(features, "train", None).tolist() == [0, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "train: skipping 2 movies without rows: tt0000001, tt0000003"
    ]


def test_a_split_of_movies_without_rows_is_refused(make_films: MakeFilms, tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"val": ["tt0000001"]}))
    with pytest.raises(DataError, match="no movie of split 'val' has rows"):
        split_movies(make_films([3, 0]).features, "val", str(split))


def folds_of(features: FeatureSet, split: str, n: int) -> list[list[int]]:
    return [split_movies(features, split, f"fold:{k}/{n}").tolist() for k in range(n)]


def test_folds_divide_the_train_movies_and_keep_the_test_split(make_films: MakeFilms) -> None:
    features = with_split(
        make_films([4] * 20).features, ["train"] * 12 + ["val"] * 4 + ["test"] * 4
    )
    vals, trains = folds_of(features, "val", 3), folds_of(features, "train", 3)
    assert sorted([k for val in vals for k in val]) == list(range(12))
    for val, train in zip(vals, trains, strict=True):
        assert 3 <= len(val) <= 5
        assert sorted(val + train) == list(range(12))
    assert folds_of(features, "test", 3) == [[16, 17, 18, 19]] * 3


def test_a_run_on_a_fold_takes_holdout_and_monitored_split_from_it(make_films: MakeFilms) -> None:
    features = make_films([4] * 20).features
    config = TrainingConfig(run_name="r", split="fold:1/4", holdout=0.2)
    movies = choose_movies(features, config)
    assert len(movies.holdout) == round(0.2 * (20 - len(movies.monitored)))
    assert movies.monitored.tolist() == folds_of(features, "val", 4)[1]
    together = np.concatenate([movies.train, movies.holdout, movies.monitored])
    assert sorted(together.tolist()) == list(range(20))


@pytest.mark.parametrize(
    ("split", "error", "message"),
    [
        ("fold:4/4", ConfigError, r"got 'fold:4/4', want fold:K/N"),
        ("fold:0/9", DataError, "fold:0/9: got 5 labelled movies, want at least 9"),
    ],
)
def test_an_impossible_fold_is_refused(
    make_films: MakeFilms, split: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        split_movies(make_films([4] * 5).features, "train", split)
