"""``movienet-train preview`` predicts a run without reading features."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.runtime.launch import start
from configs.schema import Config
from sharding.features import open_features
from tests.training.conftest import GENRES
from tests.training.launched import train
from training import loop
from training.checkpoint import find, load_trained
from training.dry_run import describe_models, preview
from training.registry import BUILT_IN, count_parameters
from training.split_selection import choose_movies
from training.stream.loader import FeatureStream

pytestmark = pytest.mark.slow

LENGTHS = [5 + 7 * number % 11 for number in range(42)]


@pytest.fixture
def config(make_films: Callable[..., Any], tmp_path: Path) -> Config:
    """30 movies in train, 3 of them held out, and 12 in val."""
    make_films(LENGTHS, folder=tmp_path / "features")
    names = [f"tt{number:07d}" for number in range(42)]
    (tmp_path / "split.json").write_text(json.dumps({"train": names[:30], "val": names[30:]}))
    tree = {
        "version": 1,
        "data": {"root": "unused", "runs": str(tmp_path), "genres": GENRES},
        "encoder": {"name": "films"},
        "stream": {"features_url": str(tmp_path / "features"), "window": 6, "global_batch": 9},
        "model": {"options": {"hidden": 4}},
        "training": {
            "run_name": "run",
            "split": str(tmp_path / "split.json"),
            "epochs": 2,
            "holdout": 0.1,
            "device": "cpu",
            "threads": 1,
        },
        "tracking": {"wandb": "off"},
    }
    return Config.model_validate(tree)


def test_a_run_matches_its_preview(config: Config) -> None:
    text = preview(config, ranks=1)
    distributed = start(
        device="cpu", precision="fp32", accumulation=1, expected_world_size=1, threads=1
    )
    try:
        at = loop.train(config, distributed)
    finally:
        distributed.close()
    saved = find(config.run_dir, "last")
    assert saved is not None
    assert saved.position.stream is not None
    assert f"{at.epoch} epochs, {at.step} steps" in text
    assert f"order       {saved.position.stream['plan'][:12]}   first" in text
    assert f"data {saved.identity.data[:12]}" in text
    parameters = count_parameters(load_trained(config.run_dir, "last").model)
    assert f"training.models.lstm:MaskedLSTM   {parameters:,} parameters" in text
    assert "train 27   holdout 3   val 12" in text


def test_a_loss_that_a_run_refuses_is_refused_by_its_preview(config: Config) -> None:
    training = config.training.model_copy(update={"loss": "bec"})
    with pytest.raises(ConfigError, match=r"^training\.loss: got 'bec', want 'bce', "):
        preview(config.model_copy(update={"training": training}), ranks=1)


def test_the_reads_of_two_ranks_match_the_preview(config: Config) -> None:
    from sharding.features import open_features

    figures = re.search(r"(\d+) steps of 9   (\d+) reads", preview(config, ranks=2))
    assert figures is not None
    features = open_features(config.features_url)
    movies = choose_movies(features, config.training).train
    ranks = [
        FeatureStream(features, movies, config.stream, rank=rank, world_size=2) for rank in (0, 1)
    ]
    batches = [list(stream) for stream in ranks]
    assert [len(each) for each in batches] == [int(figures[1])] * 2
    assert sum(len(batch.movie) for each in batches for batch in each) == int(figures[2])


def test_a_preview_reads_no_feature(config: Config) -> None:
    for shard in Path(config.features_url).glob("*.tar"):
        shard.write_bytes(b"")
    assert "3 steps of 9" in preview(config, ranks=1)


def test_a_run_and_its_preview_report_that_their_set_differs_from_the_configuration(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_features(config.features_url).movie_ids[0]
    data = config.data.model_copy(update={"exclude": (first,)})
    config = config.model_copy(update={"data": data})
    for look in (partial(preview, config, ranks=1), partial(train, config)):
        caplog.clear()
        look()
        assert f"contains 1 movies of data.exclude ({first})" in caplog.text


def test_models_are_listed_with_sizes_and_options_in_80_columns() -> None:
    text = describe_models(dim=512, n_genres=21, frames=256)
    title, *blocks = text.split("\n\n")
    assert title == "sizes for dim 512, 21 genres and windows of 256 rows:"
    assert [block.split()[0] for block in blocks] == list(BUILT_IN)
    assert re.search(r" 10,773 parameters\n    dropout=0\.3  unit_rows=True$", blocks[0])
    assert max(map(len, text.splitlines())) <= 80
