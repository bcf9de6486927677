"""External feature tars, and a configuration that indexes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from configs.schema import Config
from sharding.features import FeatureSet, open_features
from sharding.index_tars import index_tars, publish_index
from sharding.storage.base import Range
from sharding.storage.open import open_storage

Rows = dict[str, np.ndarray[Any, Any]]


def make_rows(n_movies: int = 11, dtype: str = "<f2", dim: int = 6) -> Rows:
    values = np.random.Generator(np.random.PCG64(3))
    return {
        f"tt{k:07d}": values.standard_normal((4 + 37 * k % 50, dim)).astype(dtype)
        for k in range(n_movies)
    }


def write(folder: Path, rows: Mapping[str, Any], field: str = "features.npy") -> None:
    """Write tars of four movies each with the writer of webdataset, with additional fields."""
    folder.mkdir(parents=True, exist_ok=True)
    movies = list(rows.items())
    for shard in range(0, len(movies), 4):
        with webdataset.TarWriter(str(folder / f"clip-{shard // 4:03d}.tar")) as writer:
            for key, features in movies[shard : shard + 4]:
                sample = {"__key__": key, "json": {"title": key}, "shots.npy": np.zeros(3)}
                writer.write(sample | {field: features})


def config_of(tmp_path: Path, tars: str, **data: Any) -> Config:
    metadata = tmp_path / "meta.json"
    if not metadata.exists():
        genres = {f"tt{k:07d}": ["Drama", "Comedy"][: 1 + k % 2] for k in range(20)}
        metadata.write_text(json.dumps(genres))
    tree = {
        "version": 1,
        "data": {"root": str(tmp_path / "root"), "metadata": str(metadata), "feature_tars": tars}
        | data,
        "encoder": {"name": "foreign"},
        "storage": {"timeout": 20},
        "training": {"run_name": "run"},
    }
    return Config.model_validate(tree)


def indexed(config: Config) -> FeatureSet:
    publish_index(open_storage(config.features_dir), index_tars(config))
    return open_features(config.features_dir, config.storage)


def rows_of(features: FeatureSet) -> Rows:
    """Read every movie through the index."""
    by_movie = {}
    for movie, name in enumerate(features.movie_ids):
        rows = np.empty((int(features.index.rows[movie]), features.dim), "<f2")
        start = Range(features.shard_file(movie), int(features.index.offset[movie]))
        features.storage.read_into([start], [rows.reshape(-1).view(np.uint8).data])
        by_movie[name] = rows
    return by_movie
