"""Batches of the frames of a shard, and the rows of each movie; pure functions.

The batch size affects the last bit of a feature, so every forward pass has the full size: a batch
may contain frames of several movies but only of one shard, and the last one is padded.
"""

# F = frames of the shard, M = movies of the shard

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def plan_batches(n_frames: int, batch_size: int) -> tuple[range, ...]:
    """Split the frames of a shard into batches, in order.

    Args:
        n_frames: Frames of the shard including rejected ones, so that batches do not depend on
            which images can be decoded.
        batch_size: Frames per forward pass.

    Returns:
        Ranges of frame numbers. All but the last are full, none is empty.

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
        movie_F: Integers, ascending: the movie of each frame as position in the shard's list.
        n_movies: Movies of the shard; a movie without frames gets an empty slice.

    Raises:
        ValueError: the frames are not grouped by movie in order, or a position is out of range.
    """
    movie_F = movie_F.astype(np.int64)
    if movie_F.size and (np.any(np.diff(movie_F) < 0) or not 0 <= movie_F[-1] < n_movies):
        raise ValueError(f"frames: movies are not in order or not all below {n_movies}")
    edges = np.searchsorted(movie_F, np.arange(n_movies + 1))
    return tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(edges))
