"""Small feature sets, built and sealed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sharding.features import (
    MovieFeatures,
    feature_shard_done,
    publish_feature_shard,
    seal_features,
)
from sharding.labels import Labels, make_labels
from sharding.storage.base import Storage

DIM = 6
GENRES = ("Drama", "War")


def movie_features(number: int) -> MovieFeatures:
    n = number % 4 + 1
    return MovieFeatures(
        movie=f"tt{number:07d}",
        features_ND=(np.arange(n * DIM).reshape(n, DIM) + number).astype(np.float16),
        shots_N=np.arange(n, dtype=np.int32),
        images=n + 1,
        rejected={"shot_0009_img_0.jpg": "not a picture"},
    )


def labels_for(movies: Sequence[str]) -> Labels:
    metadata = {movie: [GENRES[int(movie[-1]) % 2]] for movie in movies}
    return make_labels(movies, GENRES, metadata, dict.fromkeys(movies, "train"))[0]


def make_features(storage: Storage, n_movies: int = 7) -> None:
    for number, first in enumerate(range(0, n_movies, 3)):
        if not feature_shard_done(storage, number, f"source {number}"):
            movies = (movie_features(k) for k in range(first, min(first + 3, n_movies)))
            publish_feature_shard(storage, number, movies, input_digest=f"source {number}")
    n_shards = -(-n_movies // 3)
    seal_features(
        storage, n_shards=n_shards, provenance={"import": {}, "dim": DIM}, labels_for=labels_for
    )
