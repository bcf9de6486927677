"""The base class of all streams: position, lifetime, statistics and checked arguments.

A subclass implements reading only: it yields the batches of an epoch, starting at a given step.
"""

from __future__ import annotations

import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from configs.errors import ConfigError, DataError
from training.stream.epoch_plan import IntArray, SamplingOrder, movie_set
from training.stream.reader import ReadStats, check_process

if TYPE_CHECKING:
    from configs.schema import StreamConfig
    from sharding.features import FeatureSet
    from sharding.storage.base import RangeReader
    from training.stream.batch import Batch
    from training.stream.cursor import EpochCursor, StreamState

logger = logging.getLogger(__name__)

_WRAPPERS = {"DataLoaderDispatcher", "DataLoaderShard", "IterableDatasetShard"}


class Share(NamedTuple):
    """Slices of each global batch that belong to one rank."""

    rank: int
    world_size: int
    accumulation: int

    @property
    def n_slices(self) -> int:
        """Slices per global batch."""
        return self.world_size * self.accumulation

    def slice_index(self, micro: int) -> int:
        """Return the index of this rank's slice in micro-batch ``micro``."""
        return micro * self.world_size + self.rank


class BatchStream(ABC):
    """Epochs of batches for one rank.

    Iterating yields the rest of the current epoch; the next iteration is the next epoch. Every rank
    yields the same number of batches. Only the latest iteration is valid.

    Args:
        cursor: Position, owned by the stream.
        share: This rank's slices of each global batch.
        source: Reader of the rows.
    """

    def __init__(self, cursor: EpochCursor, share: Share, source: RangeReader) -> None:
        self._cursor, self._share, self._source = cursor, share, source
        self._stats = ReadStats()
        self._iteration = 0
        self._closed = False
        self._process = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def epoch(self) -> int:
        """Current epoch; already the next one while its last batch is being trained on."""
        return self._cursor.epoch

    @property
    def step(self) -> int:
        """Completed optimizer steps of the current epoch: all their batches have been yielded."""
        return self._cursor.step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the same for all epochs and ranks."""
        return self._cursor.steps_per_epoch

    @property
    def source(self) -> RangeReader:
        """Reader of the rows: the storage of the feature set, or the cache in front of it."""
        return self._source

    @property
    @abstractmethod
    def padding_share(self) -> float:
        """Share of windows that are padding, 0 to 1."""

    def __len__(self) -> int:
        """Return the number of batches of a complete epoch, the micro-batches of all its steps.

        The first iteration after a resume yields fewer: the rest of its epoch. Consumers such as
        Lightning and torch's ``DataLoader`` ask once, and use the answer for all epochs.
        """
        return self.steps_per_epoch * self._share.accumulation

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch.

        A step that was interrupted between its micro-batches restarts with the first one.

        Raises:
            MovieNetError: reading failed, the stream is used in a forked child, or Accelerate has
                wrapped it.
            RuntimeError: the stream is closed, or this iteration is no longer the latest.
        """
        check_process(self._process)
        _refuse_wrapper()
        self._check_open()
        self._end_iteration()
        # Not a generator itself: the checks above run at ``iter``, not at the first ``next``.
        return self._iterate(self._iteration)

    def state_dict(self) -> StreamState:
        """Return the position; the same dict on every rank.

        It counts the optimizer steps whose micro-batches have all been yielded, not the batches
        read ahead. After the last step of an epoch it is the start of the next epoch.
        A consumer that takes batches before it trains on them saves ``state_after`` instead.
        """
        return self._cursor.state_dict()

    def state_after(self, batch: Batch) -> StreamState:
        """Return the state to save once ``batch`` has been trained on, however many followed it.

        Before the last micro-batch of a step it is the start of that step.
        """
        if batch.last_micro:
            return self._cursor.state_after(batch.epoch, batch.step)
        return self._cursor.state_before(batch.epoch, batch.step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at ``state``; the world size may differ from the run that saved it.

        Raises:
            StateError: the state is corrupt, or was saved with different data, labels or plan.
        """
        self._cursor.load_state_dict(state)
        self._end_iteration()

    def stats(self) -> dict[str, float]:
        """Return the statistics of this rank.

        ``windows`` (weight above 0), ``requests`` (ranges), ``bytes``, ``waited_s`` (seconds that
        the consumer waited), ``seconds`` (of iteration) and ``waited_share``, their ratio. The
        counters of the source since it was opened are added: ``requests`` and ``retries`` of an
        object store, ``cache_hits``, ``cache_misses`` and ``cache_admitted_bytes`` of a cache.
        """
        stats = self._stats
        return {
            "windows": stats.windows,
            "requests": stats.ranges,
            "bytes": stats.n_bytes,
            "waited_s": stats.waited_s,
            "seconds": stats.seconds,
            "waited_share": stats.waited_s / stats.seconds if stats.seconds else 0.0,
            "retries": 0,
            "cache_hits": 0,
            **self._source.counts(),
        }

    def close(self) -> None:
        """Stop reading and all threads. Batches that were yielded remain valid."""
        self._closed = True
        self._end_iteration()

    @abstractmethod
    def _read_epoch(self, epoch: int, first_step: int) -> Generator[Batch, None, None]:
        """Yield this rank's batches of an epoch from ``first_step`` on; closing stops reading."""

    @abstractmethod
    def _stop_reading(self) -> None:
        """Stop the threads of earlier iterations."""

    def _iterate(self, iteration: int) -> Iterator[Batch]:
        """Yield the rest of the epoch; the threads exist exactly as long as this generator."""
        self._check_newest(iteration)
        epoch = self._cursor.epoch
        with closing(self._read_epoch(epoch, self._cursor.step)) as batches:
            for batch in batches:
                # Before the yield: a state saved while this batch is trained on counts its step.
                if batch.last_micro:
                    self._cursor.advance(epoch, batch.step)
                yield batch
                del batch  # its buffer may be filled with the next one
                self._check_newest(iteration)

    def _end_iteration(self) -> None:
        """Invalidate the current iteration and stop its threads."""
        self._iteration += 1  # first: a generator still in use then stops with a clear error
        self._stop_reading()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(
                "stream: got used after close(), want an open stream; create a new one"
            )

    def _check_newest(self, iteration: int) -> None:
        check_process(self._process)
        self._check_open()
        if iteration != self._iteration:
            raise RuntimeError(
                "stream: this iteration is over, because another one started or a state was "
                "loaded; use one iteration at a time"
            )

    def _log_epoch(self, n_movies: int) -> None:
        logger.info(
            "stream: %s movies, %s steps per epoch, %.1f%% padding on %d %s",
            f"{n_movies:,}",
            f"{self.steps_per_epoch:,}",
            100 * self.padding_share,
            self._share.world_size,
            "rank" if self._share.world_size == 1 else "ranks",
        )


def order_of(config: StreamConfig, *, shuffle_frames: bool) -> SamplingOrder:
    """Return the settings that determine the order.

    Raises:
        ConfigError: a setting is out of range.
    """
    return SamplingOrder(
        seed=config.seed,
        window=config.window,
        windows_per_movie=config.windows_per_movie,
        global_batch=config.global_batch,
        drop_last=config.drop_last,
        shuffle_block_shards=config.shuffle_block_shards,
        shuffle_frames=shuffle_frames,
        sampling=config.sampling,
        stride=config.stride,
        unit=config.unit,
        bucket_batches=config.bucket_batches,
    )


def checked_movies(features: FeatureSet, movies: IntArray) -> IntArray:
    """Return the positions in ascending order, int64 ``[N]``.

    Raises:
        DataError: there are no movies, or a movie has no rows.
        ValueError: a position is not in the index, or occurs twice.
    """
    positions = movie_set(movies)
    location = features.storage.location
    if not len(positions):
        raise DataError(
            f"{location}: got no movies to read, want at least one; is the split empty?"
        )
    if positions[-1] >= len(features.index.rows):
        raise ValueError(f"movies: got {positions[-1]}, want below {len(features.index.rows)}")
    empty = positions[features.index.rows[positions] == 0]
    if len(empty):
        raise DataError(
            f"{location}: movie {features.movie_ids[empty[0]]} has no rows ({len(empty)} movies in "
            "total); remove them from the split"
        )
    return positions


def checked_share(rank: int, world_size: int, accumulation: int) -> Share:
    """Return the share of a rank.

    Raises:
        ValueError: the rank is not below the world size, or ``accumulation`` is below 1.
    """
    if world_size < 1 or not 0 <= rank < world_size or accumulation < 1:
        raise ValueError(
            f"stream: got rank {rank} of {world_size} with accumulation {accumulation}, want a "
            "rank from 0 to below the world size, and an accumulation of at least 1"
        )
    return Share(rank, world_size, accumulation)


def _refuse_wrapper() -> None:
    """Refuse iteration by Accelerate's data loaders.

    They take the next batch before they yield one, so a saved state would be one step ahead, and on
    several ranks they distribute batches that belong to one rank already. Accelerate wraps a
    ``DataLoader`` around an iterable without informing it, so the call stack is the only place to
    detect this.

    Raises:
        ConfigError: one of the callers is such a data loader.
    """
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        owner = type(frame.f_locals.get("self")).__name__
        if frame.f_globals.get("__name__") == "accelerate.data_loader" and owner in _WRAPPERS:
            raise ConfigError(
                f"stream: got iterated by Accelerate's {owner}, which takes a batch ahead of a "
                "saved state, and would distribute batches over the ranks a second time; pass the "
                "stream itself to prepare(), which returns it unchanged (do not prepare a "
                "DataLoader around it, even with dispatch_batches=False)"
            )
