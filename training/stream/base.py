"""What every kind of stream shares: its position, its lifetime, its statistics, its arguments.

A subclass only reads: it yields the batches of an epoch from a step on.
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

_DISPATCHERS = {"DataLoaderDispatcher", "IterableDatasetShard"}


class Share(NamedTuple):
    """Which slices of each global batch belong to one rank."""

    rank: int
    world_size: int
    accumulation: int

    @property
    def parts(self) -> int:
        """Slices of a global batch."""
        return self.world_size * self.accumulation

    def part(self, micro: int) -> int:
        """Return the number of this rank's slice in micro-batch ``micro``."""
        return micro * self.world_size + self.rank


class BatchStream(ABC):
    """Epochs of batches for one rank.

    Iterating yields what remains of the current epoch; the next iteration is the next epoch. Every
    rank yields the same number of batches. Only the newest iteration is alive.

    Args:
        cursor: Position. The stream owns it.
        share: This rank's part of each global batch.
        source: Where rows are read.
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
        """Optimizer steps of the current epoch whose batches have all been handed out."""
        return self._cursor.step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the same for all epochs and ranks."""
        return self._cursor.steps_per_epoch

    @property
    def source(self) -> RangeReader:
        """Where rows are read: the storage of the feature set, or the cache in front of it."""
        return self._source

    @property
    @abstractmethod
    def padding_share(self) -> float:
        """Share of all windows that only fill batches up, 0 to 1."""

    def __len__(self) -> int:
        """Return the number of batches that iterating from here yields, at least 1.

        These are the micro-batches of the remaining steps: the length of an epoch at its start,
        less after a resume. After the last batch it is the length of the next epoch.
        """
        return self._cursor.remaining_steps * self._share.accumulation

    def __iter__(self) -> Iterator[Batch]:
        """Yield what remains of the current epoch.

        A step that was interrupted between its micro-batches restarts with its first one.

        Raises:
            MovieNetError: reading failed; or the stream is used in a forked child, or Accelerate
                would distribute its batches over the ranks a second time.
            RuntimeError: the stream is closed, or this iteration is no longer the newest.
        """
        check_process(self._process)
        if self._share.world_size > 1:
            _refuse_dispatcher()
        self._check_open()
        self._end_iteration()
        return self._iterate(self._iteration)

    def state_dict(self) -> StreamState:
        """Return the position; the same dict on every rank.

        It counts the optimizer steps of which this stream has handed out all micro-batches, not
        what is read ahead. After the last step of an epoch it is the start of the next.
        """
        return self._cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at ``state``; the world size may differ from the run that saved it.

        Raises:
            StateError: the state is corrupt, or was saved with other data, labels or plan.
        """
        self._cursor.load_state_dict(state)
        self._end_iteration()

    def stats(self) -> dict[str, float]:
        """Return what this rank has read so far.

        ``windows`` (of weight above 0), ``requests`` (ranges), ``bytes``, ``waited_s`` (seconds in
        which the consumer waited), ``seconds`` (of iteration) and ``waited_share``, their ratio;
        and what the source has counted since it was opened: from an object store ``requests`` and
        ``retries``, of a cache ``cache_hits``, ``cache_misses`` and ``cache_admitted_bytes``.
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
        """Stop reading and leave no thread. Batches that were handed out stay valid."""
        self._closed = True
        self._end_iteration()

    @abstractmethod
    def _read_epoch(self, epoch: int, first_step: int) -> Generator[Batch, None, None]:
        """Yield this rank's batches of an epoch from a step on; closing it ends the reading."""

    @abstractmethod
    def _stop_reading(self) -> None:
        """Stop the threads of earlier iterations."""

    def _iterate(self, iteration: int) -> Iterator[Batch]:
        """Yield the rest of the epoch; threads live exactly as long as this generator."""
        self._check_newest(iteration)
        epoch = self._cursor.epoch
        with closing(self._read_epoch(epoch, self._cursor.step)) as batches:
            for batch in batches:
                # Before the yield: a state saved while this batch is trained on counts its step.
                if batch.last_micro:
                    self._cursor.advance(epoch, batch.step)
                yield batch
                self._check_newest(iteration)

    def _end_iteration(self) -> None:
        """Make the running iteration stale and stop its threads."""
        self._iteration += 1
        self._stop_reading()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("stream: it is closed; make a new one")

    def _check_newest(self, iteration: int) -> None:
        check_process(self._process)
        self._check_open()
        if iteration != self._iteration:
            raise RuntimeError(
                "stream: this iteration is over, since another one began or a state was loaded"
            )

    def _log_epoch(self, n_movies: int) -> None:
        logger.info(
            "stream: %d movies, %d steps per epoch, %.1f %% padding on %d ranks",
            n_movies,
            self.steps_per_epoch,
            100 * self.padding_share,
            self._share.world_size,
        )


def order_of(config: StreamConfig, *, shuffle_frames: bool) -> SamplingOrder:
    """Return the part of the configuration that decides the order.

    Raises:
        ConfigError: a field is out of range.
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
    """Return positions ``[N]`` in ascending order.

    Raises:
        DataError: there are none, or one of the movies has no rows.
        ValueError: a position is not in the index, or is given twice.
    """
    positions = movie_set(movies)
    location = features.storage.location
    if not len(positions):
        raise DataError(f"{location}: got no movies to read; is the split empty?")
    if positions[-1] >= len(features.index.rows):
        raise ValueError(f"movies: got {positions[-1]}, want below {len(features.index.rows)}")
    empty = positions[features.index.rows[positions] == 0]
    if len(empty):
        raise DataError(
            f"{location}: movie {features.movie_ids[empty[0]]} has no rows ({len(empty)} such "
            "movies); leave them out of the split"
        )
    return positions


def checked_share(rank: int, world_size: int, accumulation: int) -> Share:
    """Return the share of a rank.

    Raises:
        ValueError: the rank is not below the world size, or ``accumulation`` is below 1.
    """
    if world_size < 1 or not 0 <= rank < world_size or accumulation < 1:
        raise ValueError(
            f"got rank {rank} of {world_size} with accumulation {accumulation}, want a rank from 0 "
            "to below the world size, and accumulation of at least 1"
        )
    return Share(rank, world_size, accumulation)


def _refuse_dispatcher() -> None:
    """Refuse iteration by Accelerate's data loaders, which would split our batches over ranks.

    Each rank's batches are its own already. Accelerate wraps a ``DataLoader`` around an iterable
    without informing the iterable, so the call stack is the only place to detect it.

    Raises:
        ConfigError: one of the callers is such a data loader.
    """
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        owner = type(frame.f_locals.get("self")).__name__
        if frame.f_globals.get("__name__") == "accelerate.data_loader" and owner in _DISPATCHERS:
            raise ConfigError(
                f"stream: got iterated by Accelerate's {owner}, which would deal its batches to "
                "the ranks again; want the stream itself given to prepare(), which returns it as "
                "it is (a DataLoader around it, even with dispatch_batches=False, stays out of "
                "prepare())"
            )
