"""The first row of each shot, for rows that represent shots.

Shots are read once, when a stream is created: 4 bytes per row, and one request per movie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from configs.errors import DataError
from sharding.features import read_shots
from training.stream.epoch_plan import IntArray

if TYPE_CHECKING:
    from sharding.features import FeatureSet
    from sharding.storage.base import RangeReader


@dataclass(frozen=True, eq=False)
class Shots:
    """Shots of selected movies of an index."""

    count_M: IntArray
    """``[M]`` shots of each movie of the index; 0 for movies that were not selected."""

    edges: Mapping[int, IntArray]
    """By position of the movie: the first row of each shot, followed by the number of rows."""

    @classmethod
    def of(cls, features: FeatureSet, movies: IntArray, source: RangeReader) -> Self:
        """Read the shots of ``movies``, positions in the index.

        Raises:
            DataError: the feature set does not contain the shots of a movie.
        """
        count_M = np.zeros(len(features.index.rows), np.int64)
        edges = {}
        chosen = movies.tolist()
        for movie, shots_N in zip(chosen, read_shots(features, chosen, source), strict=True):
            if len(shots_N) and shots_N.min() < 0:
                raise DataError(
                    f"{features.storage.location}: {features.movie_ids[movie]}: got rows without "
                    "shots (imported features have none), want shots; set stream.unit: frame"
                )
            # Rows are in order of shots: a new shot starts where the number changes.
            starts = np.flatnonzero(np.diff(shots_N, prepend=-1))
            edges[movie] = np.append(starts, len(shots_N)).astype(np.int64)
            count_M[movie] = len(starts)
        return cls(count_M, edges)

    def rows(self, movie: int, shots_N: IntArray) -> tuple[IntArray, IntArray]:
        """Return the rows of selected shots of a movie, shot by shot, and the rows per shot."""
        edges = self.edges[movie]
        begins, sizes = edges[shots_N], edges[shots_N + 1] - edges[shots_N]
        firsts = np.cumsum(sizes) - sizes
        # One range over all shots, shifted per shot from its place in the result to its first row.
        return np.arange(int(sizes.sum())) + np.repeat(begins - firsts, sizes), sizes

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays in bytes."""
        return self.count_M.nbytes + sum(edges.nbytes for edges in self.edges.values())
