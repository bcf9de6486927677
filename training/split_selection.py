"""Movies of a run, divided into train, holdout and monitored split.

The holdout is taken from the train movies, by a hash of (seed, movie id), so it is the same on
every rank. It consists of the movies with the smallest hashes: a movie that leaves the train split
hardly changes the holdout. The best checkpoint is selected on the holdout, never on val.

``training.split`` overrides the split of the labels, by a file or by ``fold:2/5``. Folds divide the
labels' train movies, stratified by genre and deterministically: fold 2 is val, the other folds are
train. The test split remains test, and the labels' own val split is unused.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError, DataError
from configs.runtime.hints import hint

if TYPE_CHECKING:
    from configs.schema import Config, TrainingConfig
    from sharding.features import FeatureSet

logger = logging.getLogger(__name__)

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class SplitSelection:
    """Positions in the feature index, ascending and disjoint."""

    train: Positions
    holdout: Positions
    monitored: Positions


def open_labelled(config: Config) -> FeatureSet:
    """Open the feature set of a run and check its genres against the configuration.

    Raises:
        ConfigError: the labels have other genres, or another order.
        MovieNetError: the feature set does not exist or is not sealed.
    """
    from sharding.features import open_features

    features = open_features(config.features_url, config.storage)
    configured, labelled = config.data.genres, tuple(features.labels.genres)
    # The order counts: outputs are columns, and their names would be swapped silently.
    for number, (got, want) in enumerate(zip_longest(configured, labelled, fillvalue="none"), 1):
        if got != want:
            raise ConfigError(
                f"data.genres: got {len(configured)} genres with {got!r} as number {number}, want "
                f"the {len(labelled)} of {features.storage.location} with {want!r}; correct "
                f"data.genres, or relabel the feature set by {hint('movienet-shard relabel')}"
            )
    return features


def warn_of_other_data(config: Config, features: FeatureSet) -> None:
    """Log a warning if labels or movies of the set differ from those of the configuration."""
    from sharding.label_files import warn_of_differences

    location = features.storage.location
    warn_of_differences(config.data, features.labels, features.movie_ids, location)


def choose_movies(features: FeatureSet, config: TrainingConfig) -> SplitSelection:
    """Return the movies of a run.

    Raises:
        DataError: there is no movie to train on.
        ConfigError: the monitored split is train itself, or the holdout leaves no train movie.
    """
    if config.monitor_split in ("train", "holdout"):  # the holdout is always scored
        got = f"training.monitor_split: got {config.monitor_split!r}"
        raise ConfigError(f"{got}, want another split, e.g. 'val', or null")
    train = split_movies(features, "train", config.split)
    ids = [features.movie_ids[position] for position in train]
    held = hold_out(ids, config.holdout, seed=config.seed)
    if held.all():
        raise ConfigError(
            f"training.holdout: {config.holdout} of {len(train)} movies leaves none to train on; "
            "want a smaller fraction, or 0"
        )
    return SplitSelection(train[~held], train[held], _monitored(features, config))


def split_movies(features: FeatureSet, split: str, override: str | None) -> Positions:
    """Return the labelled movies of a split that have rows.

    Args:
        features: The feature set.
        split: Name of the split.
        override: A split file or a fold (``fold:2/5``) that replaces the labels' own split.

    Raises:
        ConfigError: the fold does not exist.
        DataError: the split has no movies, or there are fewer train movies than folds.
    """
    movies = _labelled_movies(features, split, override)
    with_rows = features.index.rows[movies] > 0
    if not with_rows.all():
        empty = [features.movie_ids[position] for position in movies[~with_rows]]
        logger.warning(
            "%s: skipping %d movies without rows: %s",
            split,
            len(empty),
            ", ".join(empty[:5]) + (", …" if empty[5:] else ""),
        )
    if not with_rows.any():
        raise DataError(f"{features.storage.location}: no movie of split {split!r} has rows")
    return movies[with_rows]


def _labelled_movies(features: FeatureSet, split: str, override: str | None) -> Positions:
    if override is None:
        return features.labels.movies(split).astype(np.int64)
    split_of = _override_split(features, override)
    labelled_M = features.labels.hot_MG.any(axis=1)
    in_split = [split_of.get(movie) == split for movie in features.movie_ids]
    movies = np.flatnonzero(labelled_M & np.array(in_split, bool)).astype(np.int64)
    if not len(movies):
        raise DataError(f"{override}: no movie of its split {split!r} has features and labels")
    return movies


def _override_split(features: FeatureSet, override: str) -> dict[str, str]:
    from sharding.labels import fold_split, parse_fold, read_split

    fold = parse_fold(override)
    if fold is None:
        return read_split(Path(override).read_bytes(), override)
    labels, ids = features.labels, features.movie_ids
    train = labels.movies("train")
    # Folds divide the train movies only: the official val and test stay unseen.
    folds = fold_split([ids[position] for position in train], labels.hot_MG[train], fold)
    return folds | {ids[k]: "test" for k in np.flatnonzero(labels.split_M == "test")}


def hold_out(movie_ids: Sequence[str], fraction: float, *, seed: int) -> NDArray[np.bool_]:
    """Return the mask of held-out movies: ``fraction`` of them, at least one if it is above 0."""
    n_held = max(1, round(fraction * len(movie_ids))) if fraction else 0
    # A hash instead of a generator: the key of a movie does not depend on the other movies.
    keys = [hashlib.sha256(f"{seed}/{movie}".encode()).digest() for movie in movie_ids]
    held = np.zeros(len(movie_ids), bool)
    held[sorted(range(len(keys)), key=keys.__getitem__)[:n_held]] = True
    return held


def _monitored(features: FeatureSet, config: TrainingConfig) -> Positions:
    nothing = np.zeros(0, np.int64)
    if config.monitor_split is None:
        return nothing
    try:
        return split_movies(features, config.monitor_split, config.split)
    except DataError as error:  # no result depends on it, and a small dataset may have no val
        logger.warning("training.monitor_split: %s; no split is monitored", error)
        return nothing
