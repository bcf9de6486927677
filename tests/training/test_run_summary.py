"""The summary of a run has the mAP of its best and last validation."""

from __future__ import annotations

import math

import pytest

from configs.schema import Config
from tests.training.conftest import MakeConfig
from training.checkpoint import Position
from training.metrics_file import MetricsFile
from training.run_summary import summarize

POSITION = Position(epoch=3, step=1200)


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    config = make_config()
    config.run_dir.mkdir()
    return config


def write(config: Config, *validations: dict[str, float]) -> None:
    metrics = MetricsFile(config.run_dir / "metrics.jsonl", from_step=0)
    for epoch, values in enumerate(validations, 1):
        metrics.append("train", step=4 * epoch, epoch=epoch, loss=0.5)
        metrics.append("validation", step=4 * epoch, epoch=epoch, **values)
    metrics.close()


def test_of_equally_good_validations_the_later_one_is_best(config: Config) -> None:
    write(
        config,
        {"holdout/map": 0.5, "val/map": 0.1},
        {"holdout/map": 0.5, "val/map": 0.25},
        {"holdout/map": 0.375, "val/map": 0.5},
    )
    assert summarize(config, POSITION).splitlines() == [
        f"{config.run_dir}: 3 epochs, 1,200 steps",
        "mAP                   best (epoch 2)    last (epoch 3)",
        "holdout                        0.500             0.375",
        "val                            0.250             0.500",
    ]


def test_without_a_holdout_there_is_no_best_column(config: Config) -> None:
    write(config, {"val/map": 0.25}, {"val/map": 0.5})
    assert summarize(config, POSITION).splitlines()[1:] == [
        "mAP                   last (epoch 2)",
        "val                            0.500",
    ]


@pytest.mark.parametrize("values", [{}, {"val/map": math.nan}])
def test_without_an_map_there_is_no_table(config: Config, values: dict[str, float]) -> None:
    write(config, values)
    assert summarize(config, POSITION) == f"{config.run_dir}: 3 epochs, 1,200 steps"
