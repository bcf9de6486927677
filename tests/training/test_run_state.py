"""A run starts fresh or from a checkpoint, or is refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import ConfigError, DataError, StateError
from configs.schema import Config
from tests.training.conftest import MakeConfig, MakeFilms
from tests.training.launched import attempt, curve, train
from training.split_selection import choose_movies


def test_a_finished_run_is_done(whole: Config) -> None:
    assert train(whole).step == 12
    assert not (whole.run_dir / "attempt-2.json").exists()


def test_an_lstm_trains_in_bf16_or_is_refused_in_one_line(make_config: MakeConfig) -> None:
    config = make_config(training={"precision": "bf16", "epochs": 1})
    told = ""
    try:
        train(config)
    except ConfigError as error:  # most CPUs have no such arithmetic for LSTMs
        told = str(error)
    line = r"training\.precision: MaskedLSTM does not run in bf16 on this cpu: .+; want 'fp32'"
    assert not told or re.match(line, told)
    assert attempt(config, 1)[0] == ("failed" if told else "done")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"encoder": {"name": "longer"}}, r"data digest: .*: the feature set has changed"),
        ({"training": {"split": "fold:1/3"}}, r"plan digest: .*: the train movies"),
        ({"stream": {"seed": 1}}, r"checkpoint has stream.seed 0, the configuration 1"),
    ],
)
@pytest.mark.parametrize("epochs", [1, 2])  # done, and with an epoch to go
def test_a_run_is_neither_done_nor_gone_on_with_on_other_data(
    make_films: MakeFilms,
    make_config: MakeConfig,
    tmp_path: Path,
    change: dict[str, dict[str, Any]],
    told: str,
    epochs: int,
) -> None:
    for name, n_rows in (("films", 9), ("longer", 11)):
        make_films([n_rows] * 14, folder=tmp_path / "features" / name)
    began: dict[str, dict[str, Any]] = {
        "data": {"root": str(tmp_path)},
        "stream": {"features_url": None},
        "training": {"epochs": 1, "split": "fold:0/3"},
    }
    train(make_config(**began))
    began["training"]["epochs"] = epochs
    other = {name: {**began.get(name, {}), **change.get(name, {})} for name in began | change}
    with pytest.raises(StateError, match=told):
        train(make_config(**other))


@pytest.mark.parametrize(
    ("genres", "told"),
    [
        (("Drama", "Comedy"), "got 2, 'none' as number 3; .* has 3, 'Western' there"),
        (("Drama", "Western", "Comedy"), "got 3, 'Western' as number 2; .* has 3, 'Comedy' there"),
        (("Drama", "Comedy", "Western", "War"), "got 4, 'War' as number 4; .* has 3, 'none' there"),
    ],
)
def test_genres_that_the_feature_set_does_not_have_are_told_in_one_line(
    make_config: MakeConfig, genres: tuple[str, ...], told: str
) -> None:
    line = rf"^data\.genres: {told}; set data.genres to the set's, or give the set yours by "
    with pytest.raises(ConfigError, match=line):
        train(make_config(data={"genres": genres}))


def test_a_finished_run_may_be_given_more_epochs(make_config: MakeConfig, whole: Config) -> None:
    for epochs in (1, 3):
        train(make_config(training={"epochs": epochs}))
    assert curve(make_config()) == curve(whole)


def test_the_parts_of_a_run_have_no_movie_in_common(make_config: MakeConfig) -> None:
    from sharding.features import open_features

    config = make_config()
    movies = choose_movies(open_features(config.features_url), config.training)
    assert (len(movies.train), len(movies.holdout), len(movies.monitored)) == (27, 3, 12)
    together = np.concatenate([movies.train, movies.holdout, movies.monitored])
    assert sorted(together.tolist()) == list(range(42))


def test_a_split_without_train_movies_is_told(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text('{"val": ["tt0000001"]}')
    config = make_config(training={"split": str(tmp_path / "empty.json")})
    with pytest.raises(DataError, match="no movie of its 'train' has features and labels"):
        train(config)


@pytest.mark.parametrize("part", ["train", "holdout"])
def test_watching_what_a_run_learns_or_chooses_from_is_refused(
    make_config: MakeConfig, part: str
) -> None:
    with pytest.raises(ConfigError, match=rf"training\.monitor_split: got '{part}'"):
        train(make_config(training={"monitor_split": part}))
