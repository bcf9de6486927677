"""Fixtures: small feature sets in which no two movies share a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from configs.schema import Config
from sharding.features import (
    FeatureSet,
    MovieFeatures,
    open_feature_storage,
    publish_feature_shard,
    seal_features,
)
from sharding.labels import Labels, make_labels
from sharding.storage.local import DiskStorage
from sharding.storage.memory import MemoryStorage
from tests.training.launched import train

LENGTHS = [5 + 7 * number % 11 for number in range(42)]
GENRES = ("Drama", "Comedy", "Western")


@dataclass(frozen=True)
class Films:
    """A sealed feature set with the rows it was built from."""

    features: FeatureSet
    rows: tuple[NDArray[np.float16], ...]
    """``[N, D]`` of each movie, by position in the index."""

    @property
    def movies(self) -> NDArray[np.int64]:
        """Positions of all movies."""
        return np.arange(len(self.rows))

    def window(self, movie: int, start: int, frames: int) -> NDArray[np.float16]:
        """Return the expected window, zero after the movie's end."""
        window = np.zeros((frames, self.features.dim), np.float16)
        rows = self.rows[movie][start : start + frames]
        window[: len(rows)] = rows
        return window


def shots_of(n_rows: int, *, with_shots: bool = True) -> NDArray[np.int32]:
    """Return the shot of each row, -1 without shots."""
    if not with_shots:
        return np.full(n_rows, -1, np.int32)
    sizes = np.resize([1, 2, 3], n_rows)
    return np.repeat(np.arange(n_rows), sizes)[:n_rows].astype(np.int32)


MakeFilms = Callable[..., Films]
MakeConfig = Callable[..., Config]


def labels_for(movies: Sequence[str]) -> Labels:
    """Label movie i with genre i modulo 3, and Drama if i is a multiple of 4; all are in train."""
    metadata = {
        movie: {GENRES[i % 3]} | ({"Drama"} if i % 4 == 0 else set())
        for i, movie in enumerate(movies)
    }
    genres_of = {movie: sorted(genres) for movie, genres in metadata.items()}
    return make_labels(movies, GENRES, genres_of, dict.fromkeys(movies, "train"))[0]


@pytest.fixture(scope="session")
def make_films() -> MakeFilms:
    """``make_films(n_rows, dim=8, folder=None)``: a set of movies of these lengths, 7 per shard.

    With ``shots``, the rows belong to shots of 1, 2, 3, 1, 2, 3, … rows, else to no shot.
    """

    def make(
        n_rows: Sequence[int],
        *,
        dim: int = 8,
        folder: Path | None = None,
        shots: bool = False,
        origin: Mapping[str, object] = MappingProxyType({"from": "test"}),
    ) -> Films:
        storage = MemoryStorage() if folder is None else DiskStorage(folder)
        values = np.random.Generator(np.random.PCG64(5))
        rows = tuple(values.standard_normal((n, dim)).astype(np.float16) for n in n_rows)
        movies = [
            MovieFeatures(
                f"tt{number:07d}", movie, shots_of(len(movie), with_shots=shots), len(movie)
            )
            for number, movie in enumerate(rows)
        ]
        n_shards = -(-len(movies) // 7)
        for shard in range(n_shards):
            content = movies[7 * shard : 7 * shard + 7]
            publish_feature_shard(storage, shard, content, input_digest="test")
        provenance = {"import": dict(origin), "dim": dim}
        seal_features(storage, n_shards=n_shards, provenance=provenance, labels_for=labels_for)
        return Films(open_feature_storage(storage), rows)

    return make


@pytest.fixture(scope="session")
def film_folder(make_films: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 movies on disk, the last 12 of them in val."""
    folder = tmp_path_factory.mktemp("films")
    make_films(LENGTHS, folder=folder / "features")
    names = [f"tt{number:07d}" for number in range(42)]
    split = {"train": names[:30], "val": names[30:]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


@pytest.fixture
def make_config(film_folder: Path, tmp_path: Path) -> MakeConfig:
    """``make_config(training={…}, stream={…}, …)``: 3 epochs of 4 steps, with augmentation."""
    return partial(config_of, film_folder, tmp_path)


def config_of(
    film_folder: Path, runs: Path, run: str = "run", **sections: dict[str, Any]
) -> Config:
    """Return a run on the 42 movies, in folder ``runs``; ``sections`` override these defaults."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"root": "unused", "runs": str(runs), "genres": GENRES},
        "encoder": {"name": "films"},
        "stream": {"features_url": str(film_folder / "features"), "window": 6, "global_batch": 7},
        "model": {"options": {"hidden": 4}},
        "training": {
            "run_name": run,
            "split": str(film_folder / "split.json"),
            "epochs": 3,
            "lr": 0.01,
            "feature_noise": 0.5,
            "frame_dropout": 0.3,
            "holdout": 0.1,
            "device": "cpu",
            "threads": 1,
        },
        "eval": {"windows": 2, "batch_size": 5},
        "tracking": {"wandb": "off"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return Config.model_validate({"version": 1, **tree})


@pytest.fixture(scope="session")
def finished(film_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run without interruption. All tests share it and only read it."""
    config = config_of(film_folder, tmp_path_factory.mktemp("runs"), "finished")
    train(config)
    return config
