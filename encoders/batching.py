"""Which frames of a shard go through the tower together, and which rows belong to which movie.

Pure. A batch always has the full size, since the size decides the last bit of a feature: batches
are filled across the movies of a shard, never across shards, and the last one is padded.
"""

# F = frames of the shard, M = movies of the shard

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def plan_batches(n_frames: int, batch_size: int) -> tuple[range, ...]:
    """Cut the frames of a shard into batches, in order.

    Args:
        n_frames: Frames of the shard, rejected ones included, so that the cut never depends on
            what can be decoded.
        batch_size: Frames a forward pass.

    Returns:
        Ranges of frame numbers; all but the last are full, none is empty.

    Raises:
        ValueError: ``batch_size`` is below 1, or ``n_frames`` is negative.
    """
    if batch_size < 1 or n_frames < 0:
        raise ValueError(f"got {n_frames} frames in batches of {batch_size}, want 0 or more in 1+")
    starts = range(0, n_frames, batch_size)
    return tuple(range(start, min(start + batch_size, n_frames)) for start in starts)


def rows_of_movies(movie_F: Array, n_movies: int) -> tuple[slice, ...]:
    """Return the rows of each movie of a shard.

    Args:
        movie_F: Movie of each frame, as its place in the shard's list; never falls.
        n_movies: Movies of the shard. One without frames gets an empty slice.

    Raises:
        ValueError: the frames of a movie do not stand together, or a place is out of range.
    """
    movie_F = movie_F.astype(np.int64)
    if movie_F.size and (np.any(np.diff(movie_F) < 0) or not 0 <= movie_F[-1] < n_movies):
        raise ValueError(f"frames: movies are not in order or not all below {n_movies}")
    edges = np.searchsorted(movie_F, np.arange(n_movies + 1))
    return tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(edges))
