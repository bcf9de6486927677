"""Which movies are trained on, kept aside and watched.

The holdout is taken out of train by movie, by a hash of (seed, movie id): the same on every rank;
the movies of the smallest hashes are held, so one that leaves train hardly moves the others. The
best checkpoint is chosen on it, never on val.

``training.split`` overrides the split of the labels: by a file, or by ``fold:2/5``. Folds are made
of the labels' train movies, every genre shared out alike, always in the same way: fold 2 is val,
the others are train. Test stays test; the labels' own val is left aside.
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

if TYPE_CHECKING:
    from configs.schema import Config, TrainingConfig
    from sharding.features import FeatureSet

logger = logging.getLogger(__name__)

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class SplitSelection:
    """Positions in the feature index, ascending; no movie stands in two of them."""

    train: Positions
    holdout: Positions
    monitored: Positions


def open_labelled(config: Config) -> FeatureSet:
    """Open the feature set of a run, whose labels are for the genres of its configuration.

    Raises:
        ConfigError: its labels are for other genres, or in another order.
        MovieNetError: there is no such set, or it is not sealed.
    """
    from sharding.features import open_features

    features = open_features(config.features_url, config.storage)
    want, there = config.data.genres, tuple(features.labels.genres)
    for number, (mine, its) in enumerate(zip_longest(want, there, fillvalue="none"), 1):
        if mine != its:
            raise ConfigError(
                f"data.genres: got {len(want)}, {mine!r} as number {number}; "
                f"{features.storage.location} has {len(there)}, {its!r} there; set data.genres "
                "to the set's, or give the set yours by `movienet-shard relabel`"
            )
    return features


def choose_movies(features: FeatureSet, config: TrainingConfig) -> SplitSelection:
    """Return the movies of a run.

    Raises:
        DataError: there is no movie to train on.
        ConfigError: the split to watch is train itself, or the holdout leaves nothing.
    """
    if config.monitor_split in ("train", "holdout"):  # the holdout is scored anyway, under its name
        got = f"training.monitor_split: got {config.monitor_split!r}"
        raise ConfigError(f"{got}, want another split, e.g. 'val', or null")
    train = split_movies(features, "train", config.split)
    ids = [features.movie_ids[position] for position in train]
    held = hold_out(ids, config.holdout, seed=config.seed)
    if held.all():
        raise ConfigError(
            f"training.holdout: {config.holdout} of {len(train)} movies leaves none to train on"
        )
    return SplitSelection(train[~held], train[held], _watched(features, config))


def split_movies(features: FeatureSet, split: str, given: str | None) -> Positions:
    """Return the labelled movies of a split that have rows.

    Args:
        features: The feature set.
        split: Name of the split.
        given: A split file or a fold (``fold:2/5``) instead of the labels' own split.

    Raises:
        ConfigError: there is no such fold.
        DataError: there is no such movie, or there are fewer train movies than folds.
    """
    found = _labelled_movies(features, split, given)
    with_rows = features.index.rows[found] > 0
    if not with_rows.all():
        empty = [features.movie_ids[position] for position in found[~with_rows]]
        logger.warning(
            "%s: %d movies without rows are left out: %s",
            split,
            len(empty),
            ", ".join(empty[:5]) + (", …" if empty[5:] else ""),
        )
    if not with_rows.any():
        raise DataError(f"{features.storage.location}: no movie of split {split!r} has rows")
    return found[with_rows]


def _labelled_movies(features: FeatureSet, split: str, given: str | None) -> Positions:
    if given is None:
        return features.labels.movies(split).astype(np.int64)
    wanted = _given_split(features, given)
    labelled_M = features.labels.hot_MG.any(axis=1)
    inside = [wanted.get(movie) == split for movie in features.movie_ids]
    found = np.flatnonzero(labelled_M & np.array(inside, bool)).astype(np.int64)
    if not len(found):
        raise DataError(f"{given}: no movie of its {split!r} has features and labels")
    return found


def _given_split(features: FeatureSet, given: str) -> dict[str, str]:
    from sharding.labels import fold_split, parse_fold, read_split

    fold = parse_fold(given)
    if fold is None:
        return read_split(Path(given).read_bytes(), given)
    labels, ids = features.labels, features.movie_ids
    train = labels.movies("train")
    folds = fold_split([ids[position] for position in train], labels.hot_MG[train], fold)
    return folds | {ids[k]: "test" for k in np.flatnonzero(labels.split_M == "test")}


def hold_out(movie_ids: Sequence[str], fraction: float, *, seed: int) -> NDArray[np.bool_]:
    """Return which movies are kept aside: ``fraction`` of them, at least one if it is above 0."""
    n_held = max(1, round(fraction * len(movie_ids))) if fraction else 0
    keys = [hashlib.sha256(f"{seed}/{movie}".encode()).digest() for movie in movie_ids]
    held = np.zeros(len(movie_ids), bool)
    held[sorted(range(len(keys)), key=keys.__getitem__)[:n_held]] = True
    return held


def _watched(features: FeatureSet, config: TrainingConfig) -> Positions:
    nothing = np.zeros(0, np.int64)
    if config.monitor_split is None:
        return nothing
    try:
        return split_movies(features, config.monitor_split, config.split)
    except DataError as error:  # nothing depends on it: a few films may have no val
        logger.warning("training.monitor_split: %s; nothing is watched", error)
        return nothing
