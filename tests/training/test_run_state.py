"""Runs start fresh or from a checkpoint, or are refused in one line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import ConfigError, DataError, StateError
from configs.schema import Config
from tests.training.conftest import MakeConfig, MakeFilms
from tests.training.launched import attempt, curve, train
from training.split_selection import choose_movies

pytestmark = pytest.mark.slow


def test_a_finished_run_is_not_trained_again_and_its_attempt_is_done(
    finished: Config, tmp_path: Path
) -> None:
    shutil.copytree(finished.run_dir, tmp_path / finished.training.run_name)
    data = finished.data.model_copy(update={"runs": str(tmp_path)})
    config = finished.model_copy(update={"data": data})
    metrics = config.run_dir / "metrics.jsonl"
    before = metrics.read_bytes()
    assert train(config).step == 12
    assert metrics.read_bytes() == before
    # A batch script asks for the record of its own life, so each start leaves one.
    assert attempt(config, 2) == ("done", 12)


def test_an_lstm_trains_in_bf16_or_is_refused_in_one_line(make_config: MakeConfig) -> None:
    config = make_config(training={"precision": "bf16", "epochs": 1})
    message = ""
    try:
        train(config)
    except ConfigError as error:  # most CPUs do not support bf16 LSTMs
        message = str(error)
    line = r"training\.precision: MaskedLSTM does not run in bf16 on this cpu: .+; want 'fp32'"
    assert not message or re.match(line, message)
    assert attempt(config, 1)[0] == ("failed" if message else "done")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"name": "longer"}}, r"data digest: .*: the feature set has changed"),
        ({"training": {"split": "fold:1/3"}}, r"plan digest: .*: the train movies"),
        ({"stream": {"seed": 1}}, r"got stream.seed 1, want 0 as in its checkpoint"),
    ],
)
@pytest.mark.parametrize("epochs", [1, 2])  # a finished run, and one with an epoch left
def test_a_run_on_other_data_is_neither_finished_nor_resumed(
    make_films: MakeFilms,
    make_config: MakeConfig,
    tmp_path: Path,
    change: dict[str, dict[str, Any]],
    message: str,
    epochs: int,
) -> None:
    for name, n_rows in (("films", 9), ("longer", 11)):
        make_films([n_rows] * 14, folder=tmp_path / "features" / name)
    original: dict[str, dict[str, Any]] = {
        "data": {"root": str(tmp_path)},
        "stream": {"features_url": None},
        "training": {"epochs": 1, "split": "fold:0/3"},
    }
    train(make_config(**original))
    original["training"]["epochs"] = epochs
    other = {name: {**original.get(name, {}), **change.get(name, {})} for name in original | change}
    with pytest.raises(StateError, match=message):
        train(make_config(**other))


@pytest.mark.parametrize(
    ("genres", "number", "got", "want"),
    [
        (("Drama", "Comedy"), 3, "none", "Western"),
        (("Drama", "Western", "Comedy"), 2, "Western", "Comedy"),
        (("Drama", "Comedy", "Western", "War"), 4, "War", "none"),
    ],
)
def test_genres_other_than_those_of_the_feature_set_are_reported_in_one_line(
    make_config: MakeConfig, genres: tuple[str, ...], number: int, got: str, want: str
) -> None:
    line = (
        rf"^data\.genres: got {len(genres)} genres with '{got}' as number {number}, "
        rf"want the 3 of .* with '{want}'; correct data\.genres, or relabel the feature set by "
    )
    with pytest.raises(ConfigError, match=line):
        train(make_config(data={"genres": genres}))


def test_a_loss_without_a_gradient_is_refused_before_the_run_starts(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "loss.py").write_text(
        "def misses(logits, labels):\n    return ((logits > 0).float() - labels).abs().mean(1)\n"
    )
    config = make_config(training={"loss": f"{tmp_path / 'loss.py'}:misses"})
    line = r"^training\.loss: .*loss\.py:misses gives the logits no gradient; use "
    with caplog.at_level("INFO"), pytest.raises(ConfigError, match=line):
        train(config)
    assert "starting at" not in caplog.text


def test_a_finished_run_can_be_extended_by_epochs(
    make_config: MakeConfig, finished: Config, caplog: pytest.LogCaptureFixture
) -> None:
    for epochs in (1, 3):
        caplog.clear()
        with caplog.at_level("INFO", "training.threads"):
            train(make_config(training={"epochs": epochs, "threads": 0}))
        assert "threads 1 of " in caplog.text  # by the size of the model, also when it resumes
    assert curve(make_config()) == curve(finished)


def test_train_holdout_and_monitored_split_have_no_movie_in_common(make_config: MakeConfig) -> None:
    from sharding.features import open_features

    config = make_config()
    movies = choose_movies(open_features(config.features_url), config.training)
    assert (len(movies.train), len(movies.holdout), len(movies.monitored)) == (27, 3, 12)
    together = np.concatenate([movies.train, movies.holdout, movies.monitored])
    assert sorted(together.tolist()) == list(range(42))


def test_a_split_without_train_movies_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text('{"val": ["tt0000001"]}')
    config = make_config(training={"split": str(tmp_path / "empty.json")})
    with pytest.raises(DataError, match="no movie of its split 'train' has features and labels"):
        train(config)


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_monitoring_the_train_split_or_the_holdout_is_refused(
    make_config: MakeConfig, split: str
) -> None:
    with pytest.raises(ConfigError, match=rf"training\.monitor_split: got '{split}'"):
        train(make_config(training={"monitor_split": split}))
