"""The webdataset stream and the index stream yield the same samples with the same labels."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from configs.errors import ConfigError, StateError
from configs.runtime.launch import start
from configs.runtime.signals import StopRequest
from configs.schema import Config, StreamConfig
from sharding.features import FeatureSet, open_features
from sharding.index_tars import index_tars, publish_index
from sharding.storage.open import open_storage
from tests.training.conftest import GENRES
from training.loop import train
from training.stream.loader import FeatureStream
from training.stream.webdataset_stream import WebDatasetStream

N_ROWS = [3 + 7 * (movie % 9) for movie in range(40)]
WINDOW = 16


@pytest.fixture
def films(make_films: Callable[..., Any], tmp_path: Path) -> Any:
    return make_films(N_ROWS, folder=tmp_path / "set")


def samples(stream: Any) -> list[Any]:
    """Return the windows of an epoch with rows, mask and labels, sorted by movie."""
    windows = []
    for batch in stream:
        columns = (batch.movie, batch.window_index, batch.start)
        for k in np.flatnonzero(batch.weight.numpy()).tolist():
            rows = (batch.features[k], batch.mask[k], batch.labels[k])
            place = tuple(int(column[k]) for column in columns)
            windows.append((place, *(each.numpy().tobytes() for each in rows)))
    return sorted(windows)


def both(
    features: FeatureSet, world: int = 1, accumulation: int = 1, **options: Any
) -> tuple[list[Any], list[Any]]:
    """Return the samples of one epoch over all ranks, from the index stream and from webdataset."""
    config = StreamConfig(window=WINDOW, global_batch=6, seed=2, **options)
    movies = np.arange(1, len(features.index))
    epochs: list[list[Any]] = []
    for kind in (FeatureStream, WebDatasetStream):
        streams = [
            kind(features, movies, config, rank=k, world_size=world, accumulation=accumulation)
            for k in range(world)
        ]
        assert len({stream.steps_per_epoch for stream in streams}) == 1
        epochs.append(sorted(each for stream in streams for each in samples(stream)))
    return epochs[0], epochs[1]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("windows_per_movie", [1, 3])
def test_the_samples_and_labels_are_the_same(
    films: Any, world: int, windows_per_movie: int
) -> None:
    exact, reference = both(films.features, world, windows_per_movie=windows_per_movie)
    assert len(exact) == 39 * windows_per_movie
    assert reference == exact


@pytest.mark.parametrize(
    "options", [{"sampling": "random_frames"}, {"stride": 2}, {"sampling": "uniform_windows"}]
)
def test_the_samples_are_the_same_for_other_samplings(films: Any, options: dict[str, Any]) -> None:
    exact, reference = both(films.features, 2, 2, windows_per_movie=2, **options)
    assert reference == exact


@pytest.mark.parametrize(("dtype", "between"), [("<f2", "-"), ("<f4", "-"), (">f4", ".")])
def test_the_samples_are_the_same_for_external_tars(
    tmp_path: Path, dtype: str, between: str
) -> None:
    values = np.random.Generator(np.random.PCG64(3))
    (tmp_path / "tars").mkdir()
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / "tars" / f"{shard}.tar")) as writer:
            for k in range(5):
                rows = values.standard_normal((4 + 9 * k, 6)).astype(dtype)
                writer.write(
                    {"__key__": f"tt000000{shard}{between}{k}", "clip.npy": rows, "txt": "film"}
                )
    names = {
        f"tt000000{shard}{between}{k}": ["Drama", "Comedy"][k % 2]
        for shard in range(3)
        for k in range(5)
    }
    (tmp_path / "meta.json").write_text(
        json.dumps({name: [genre] for name, genre in names.items()})
    )
    tree = {
        "version": 1,
        "data": {
            "root": str(tmp_path),
            "metadata": str(tmp_path / "meta.json"),
            "feature_tars": str(tmp_path / "tars"),
            "feature_key": "clip",
        },
        "encoder": {"name": "external"},
        "training": {"run_name": "run"},
    }
    config = Config.model_validate(tree)
    publish_index(open_storage(config.features_dir), index_tars(config))
    exact, reference = both(open_features(config.features_dir), 2)
    assert len(exact) == 14
    assert reference == exact


@pytest.mark.slow
@pytest.mark.usefixtures("films")
def test_a_run_trains_with_webdataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = {
        "version": 1,
        "data": {"root": "unused", "runs": str(tmp_path), "genres": GENRES},
        "encoder": {"name": "films"},
        "stream": {"features_url": str(tmp_path / "set"), "window": 6, "reader": "webdataset"},
        "model": {"options": {"hidden": 4}},
        "training": {
            "run_name": "run",
            "epochs": 2,
            "monitor_split": None,
            "device": "cpu",
            "threads": 1,
        },
        "tracking": {"wandb": "off"},
    }
    distributed = start(
        device="cpu", precision="fp32", accumulation=1, expected_world_size=1, threads=1
    )
    try:
        with caplog.at_level(logging.INFO), StopRequest() as stop:
            at = train(Config.model_validate(tree), distributed, stop)
    finally:
        distributed.close()
    assert (at.epoch, at.step) == (2, 4)  # 36 movies, 4 held out, in batches of 32
    assert "webdataset reads complete samples" in caplog.text


def test_mixup_is_refused(films: Any) -> None:
    with pytest.raises(ConfigError, match=r"training\.mixup"):
        WebDatasetStream(films.features, films.movies, StreamConfig(window=WINDOW), partners=True)


def test_the_weights_of_all_ranks_sum_to_the_global_weight(films: Any) -> None:
    config = StreamConfig(window=WINDOW, global_batch=6)
    streams = [
        WebDatasetStream(films.features, films.movies, config, rank=k, world_size=4)
        for k in range(4)
    ]
    for batches in zip(*streams, strict=True):
        total = sum(float(batch.weight.sum()) for batch in batches)
        assert {batch.global_weight for batch in batches} == {total}
        assert all(batch.mask.any(dim=1).all() for batch in batches)


def test_a_state_is_resumed_on_the_same_number_of_ranks_only(films: Any) -> None:
    config = StreamConfig(window=WINDOW, global_batch=6)
    stream = WebDatasetStream(films.features, films.movies, config)
    batches = iter(stream)
    third = [next(batches) for _ in range(3)][-1]
    state = stream.state_dict()
    assert state == stream.state_after(third)
    rest = samples(batches)
    resumed = WebDatasetStream(films.features, films.movies, config)
    resumed.load_state_dict(state)
    assert samples(resumed) == rest
    other = WebDatasetStream(films.features, films.movies, config, rank=1, world_size=2)
    with pytest.raises(StateError, match="world size: got 1, want 2"):
        other.load_state_dict(state)
    exact = FeatureStream(films.features, films.movies, config)
    with pytest.raises(StateError, match="plan digest"):
        exact.load_state_dict(state)


def test_the_log_warns_of_the_approximate_order(
    films: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        WebDatasetStream(films.features, films.movies, StreamConfig(window=WINDOW))
    assert "complete samples, in an approximately random order" in caplog.text


@pytest.mark.parametrize(
    "options", [{"sampling": "full_movie"}, {"unit": "shot"}, {"drop_last": True}]
)
def test_unsupported_settings_are_refused_in_one_line(films: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"set stream\.reader=index$"):
        WebDatasetStream(films.features, films.movies, StreamConfig(window=WINDOW, **options))
