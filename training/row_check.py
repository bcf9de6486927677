"""Check of rows that were read: damaged bytes are no fault of the model or of the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.errors import DataError
from configs.runtime.hints import hint

if TYPE_CHECKING:
    from sharding.features import FeatureSet
    from training.stream.batch import Batch


def check_rows(features: FeatureSet, batch: Batch) -> None:
    """Check that all rows of a batch are finite.

    Raises:
        DataError: they are not; the message names the movies.
    """
    for windows in (batch, batch.partner):
        if windows is None:
            continue
        is_finite_B = windows.features.isfinite().flatten(1).all(1)
        if not is_finite_B.all():
            raise damaged_rows(features, sorted(set(windows.movie[~is_finite_B].tolist())))


def damaged_rows(features: FeatureSet, movies: Sequence[int]) -> DataError:
    """Return the error for movies, by position in the index, whose rows are not finite."""
    names = ", ".join(features.movie_ids[movie] for movie in movies[:3])
    return DataError(
        f"{features.storage.location}/{features.shard_file(movies[0])}: NaN or infinite numbers in "
        f"the rows of {names}{', …' if len(movies) > 3 else ''}; "
        f"run {hint('movienet-encode verify --repair')}"
    )
