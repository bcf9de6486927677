"""Small feature sets with rows that no two movies share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    """A sealed feature set, and the rows that went into it."""

    features: FeatureSet
    rows: tuple[NDArray[np.float16], ...]
    """``[N, D]`` of each movie, by position in the index."""

    @property
    def movies(self) -> NDArray[np.int64]:
        """Positions of all movies."""
        return np.arange(len(self.rows))

    def window(self, movie: int, start: int, frames: int) -> NDArray[np.float16]:
        """Return a window as it should be read: zero beyond the movie's end."""
        window = np.zeros((frames, self.features.dim), np.float16)
        rows = self.rows[movie][start : start + frames]
        window[: len(rows)] = rows
        return window


def shots_of(n_rows: int, *, known: bool = True) -> NDArray[np.int32]:
    """Return the shot of each row."""
    if not known:
        return np.full(n_rows, -1, np.int32)
    sizes = np.resize([1, 2, 3], n_rows)
    return np.repeat(np.arange(n_rows), sizes)[:n_rows].astype(np.int32)


MakeFilms = Callable[..., Films]
MakeConfig = Callable[..., Config]


def labels_for(movies: Sequence[str]) -> Labels:
    """Movie i has genre i modulo 3, and Drama if i is a multiple of 4; all are in train."""
    metadata = {
        movie: {GENRES[i % 3]} | ({"Drama"} if i % 4 == 0 else set())
        for i, movie in enumerate(movies)
    }
    named = {movie: sorted(genres) for movie, genres in metadata.items()}
    return make_labels(movies, GENRES, named, dict.fromkeys(movies, "train"))[0]


@pytest.fixture(scope="session")
def make_films() -> MakeFilms:
    """``make_films(n_rows, dim=8, folder=None)`` publishes films of these lengths, 7 a shard.

    Rows belong to no known shot; with ``shots``, to shots of 1, 2, 3, 1, 2, 3, … rows.
    """

    def make(
        n_rows: Sequence[int], *, dim: int = 8, folder: Path | None = None, shots: bool = False
    ) -> Films:
        storage = MemoryStorage() if folder is None else DiskStorage(folder)
        values = np.random.Generator(np.random.PCG64(5))
        rows = tuple(values.standard_normal((n, dim)).astype(np.float16) for n in n_rows)
        movies = [
            MovieFeatures(f"tt{number:07d}", film, shots_of(len(film), known=shots), len(film))
            for number, film in enumerate(rows)
        ]
        n_shards = -(-len(movies) // 7)
        for shard in range(n_shards):
            some = movies[7 * shard : 7 * shard + 7]
            publish_feature_shard(storage, shard, some, input_digest="test")
        provenance = {"import": {"from": "test"}, "dim": dim}
        seal_features(storage, n_shards=n_shards, provenance=provenance, labels_for=labels_for)
        return Films(open_feature_storage(storage), rows)

    return make


@pytest.fixture(scope="session")
def film_folder(make_films: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 films on disk, the last 12 of them in val."""
    folder = tmp_path_factory.mktemp("films")
    make_films(LENGTHS, folder=folder / "features")
    names = [f"tt{number:07d}" for number in range(42)]
    split = {"train": names[:30], "val": names[30:]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


@pytest.fixture
def make_config(film_folder: Path, tmp_path: Path) -> MakeConfig:
    """``make_config(training={…}, stream={…}, …)``: 4 steps an epoch, 3 epochs, noisy."""
    return partial(config_of, film_folder, tmp_path)


def config_of(
    film_folder: Path, runs: Path, run: str = "run", **sections: dict[str, Any]
) -> Config:
    """A run over the 42 films, below ``runs``; sections override what stands here."""
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
def whole(film_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run without interruption, to read only: all tests share it."""
    config = config_of(film_folder, tmp_path_factory.mktemp("runs"), "whole")
    train(config)
    return config
