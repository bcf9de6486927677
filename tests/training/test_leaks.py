"""With shuffled labels every model predicts the class prior: val does not leak into training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from configs.runtime.launch import start
from configs.runtime.signals import StopRequest
from configs.schema import Config
from sharding.features import MovieFeatures, open_features, publish_feature_shard, seal_features
from sharding.labels import Labels, make_labels
from sharding.storage.local import DiskStorage
from training.checkpoint import load_trained
from training.loop import train
from training.metrics import mean_ap
from training.registry import BUILT_IN
from training.scoring import score_split
from training.split_selection import split_movies
from training.stream.view import View

GENRES = ("Drama", "Comedy", "Western")
N_MOVIES, DIM, FRAMES = 600, 16, 8


def publish(folder: Path, *, shuffled: bool) -> None:
    """Publish movies whose rows are shifted towards their genres; every third one is in val."""
    random = np.random.Generator(np.random.PCG64(7))
    hot = random.random((N_MOVIES, len(GENRES))) < 0.3
    hot[~hot.any(1), 0] = True
    directions = random.standard_normal((len(GENRES), DIM))
    rows = random.standard_normal((N_MOVIES, FRAMES, DIM)) + (hot @ directions)[:, None]
    if shuffled:
        hot = random.permutation(hot)
    ids = [f"tt{number:07d}" for number in range(N_MOVIES)]

    def labels_for(movies: Sequence[str]) -> Labels:
        genres_of = {
            movie: [genre for genre, has in zip(GENRES, truth, strict=True) if has]
            for movie, truth in zip(ids, hot, strict=True)
        }
        splits = {movie: "val" if i % 3 == 2 else "train" for i, movie in enumerate(ids)}
        return make_labels(movies, GENRES, genres_of, splits)[0]

    storage, no_shots = DiskStorage(folder), np.full(FRAMES, -1, np.int32)
    movies = [
        MovieFeatures(movie, values.astype(np.float16), no_shots, FRAMES)
        for movie, values in zip(ids, rows, strict=True)
    ]
    publish_feature_shard(storage, 0, movies, input_digest="test")
    provenance = {"import": {"from": "test"}, "dim": DIM}
    seal_features(storage, n_shards=1, provenance=provenance, labels_for=labels_for)


@pytest.fixture(scope="module")
def lead(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], float]:
    """``lead(model, shuffled)``: mAP on val above the share of positives."""
    folder = tmp_path_factory.mktemp("films")
    for name in ("true", "shuffled"):
        publish(folder / name, shuffled=name == "shuffled")

    def measure(model: str, shuffled: bool) -> float:
        kind = "shuffled" if shuffled else "true"
        config = Config.model_validate(
            {
                "version": 1,
                "data": {"root": "unused", "runs": str(folder), "genres": GENRES},
                "encoder": {"name": "films"},
                "stream": {"features_url": str(folder / kind), "window": FRAMES},
                "model": {"class": model},
                "training": {
                    "run_name": f"{kind}-{model.rpartition(':')[2]}",
                    "epochs": 8,
                    "lr": 3e-3,
                    "holdout": 0,
                    "monitor_split": None,
                    "validate_epochs": 0,
                },
                "eval": {"checkpoint": "last"},
                "tracking": {"wandb": "off"},
            }
        )
        distributed = start(
            device="cpu", precision="fp32", accumulation=1, expected_world_size=1, threads=1
        )
        try:
            with StopRequest() as stop:
                train(config, distributed, stop)
            features = open_features(config.features_url)
            scores = score_split(
                load_trained(config.run_dir, "last").model,
                features,
                split_movies(features, "val", None),
                View.of(config, 1),
                batch_size=64,
                distributed=distributed,
            )
        finally:
            distributed.close()
        return mean_ap(scores.labels_MG, scores.logits_MG) - float(scores.labels_MG.mean())

    return measure


@pytest.mark.slow
@pytest.mark.parametrize("model", BUILT_IN)
def test_a_model_learns_true_labels_and_not_shuffled_ones(
    lead: Callable[[str, bool], float], model: str
) -> None:
    assert lead(model, False) > 0.2
    # The standard deviation of the mAP of 200 movies is about 0.03.
    assert abs(lead(model, True)) < 0.1
