"""Streams of batches: training epochs that resume anywhere, and one pass for scoring.

A stream is no torch ``DataLoader``: it has no worker processes and nothing to collate. In a plain
loop::

    with FeatureStream(features, movies, config, rank=rank, world_size=world) as stream:
        for batch in stream:  # what remains of the epoch
            batch = batch.to(device)
            logits = model(batch.features.float(), batch.mask)
            loss = (batch.weight * loss_B(logits, batch.labels)).sum() * world / batch.global_weight
            ...
            checkpoint["stream"] = stream.state_dict()
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypedDict

from configs.errors import ConfigError, DataError, StateError
from training.stream.cache import open_cache
from training.stream.fetch import Buffers, Fetcher, ReadStats, Ring, check_process
from training.stream.plan import (
    Cut,
    IntArray,
    Order,
    Row,
    WindowPlan,
    count_steps,
    movie_set,
    padding_share,
    plan_epoch,
    plan_partners,
    plan_scoring,
    slice_size,
)

if TYPE_CHECKING:
    from configs.schema import StreamConfig
    from sharding.features import FeatureSet
    from sharding.storage.base import Source
    from training.stream.batch import Batch
    from training.stream.shots import Shots

logger = logging.getLogger(__name__)

STATE_VERSION = 1

_AHEAD_BYTES = 1024**3
_DEALERS = {"DataLoaderDispatcher", "IterableDatasetShard"}

_HOW_TO_GO_ON = {
    "data": "the feature set is another one; give stream.source the one the run began with",
    "labels": "genres or splits have changed; give the labels the run began with",
    "plan": (
        "the train movies, training.shuffle_frames or one of stream.seed, sample, frames, stride, "
        "row, windows_per_movie, pool, global_batch, drop_last, blocks have changed; put them back"
    ),
}


class StreamState(TypedDict):
    """Where a stream stands; the same on every rank, and good for any number of ranks."""

    version: int
    epoch: int
    step: int
    data: str
    labels: str
    plan: str


class Share(NamedTuple):
    """Which slices of each global batch are one rank's."""

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


class FeatureStream:
    """Epochs of training windows for one rank.

    Iterating yields what remains of the current epoch; the next iteration is the next epoch. Every
    rank yields the same number of batches. Only the newest iteration is alive.

    Args:
        features: A sealed feature set; it stays open when the stream is closed.
        movies: int64, distinct positions in the feature index.
        config: How to read.
        rank: 0 to ``world_size - 1``.
        world_size: Ranks that share each global batch.
        accumulation: Micro-batches of an optimiser step.
        shuffle_frames: Permute the rows of every movie, by (seed, movie), before cutting windows.
        partners: Read a window of another movie beside each, as ``batch.partner``.
        source: Where rows are read; default: the storage of ``features``, or a cache before it.
        pinned: Read into memory that a GPU copies from without waiting (``batch.to`` with
            ``non_blocking``).

    Raises:
        ConfigError: an epoch would have no step, or the order is out of range.
        DataError: there are no movies, or one of them has no rows.
    """

    def __init__(
        self,
        features: FeatureSet,
        movies: IntArray,
        config: StreamConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        shuffle_frames: bool = False,
        partners: bool = False,
        source: Source | None = None,
        pinned: bool = False,
    ) -> None:
        self._features, self._config, self._partners = features, config, partners
        self._cache = None if source else open_cache(features, config, tell=rank == 0)
        self._source = source or self._cache or features.storage
        self._movies = _checked_movies(features, movies)
        self._share = _checked_share(rank, world_size, accumulation)
        self._order = order_of(config, shuffle_frames=shuffle_frames)
        self._shots = _shots_of(features, self._movies, config.row, self._source)
        self._rows = features.index.rows if self._shots is None else self._shots.count_M
        self._n_windows = self._order.n_windows(self._rows[self._movies])
        self.steps_per_epoch = count_steps(
            self._n_windows, config.global_batch, drop_last=config.drop_last
        )
        if not self.steps_per_epoch:
            raise ConfigError(
                f"stream.global_batch: got {config.global_batch} with drop_last, want at most "
                f"{self._n_windows}, the windows of an epoch"
            )
        self.batch_size = slice_size(self._n_windows, config.global_batch, self._share.parts)
        self._digests = {
            "data": features.digest,
            "labels": features.labels.digest,
            "plan": self._order.digest(self._movies),
        }
        self._epoch = self._step = 0
        self._iteration = 0
        self._closed = False
        self._process = os.getpid()
        self._stats = ReadStats()
        self._buffers = _buffers(config.prefetch, config.ahead_bytes, pinned=pinned)
        self._fetchers: list[weakref.ref[Fetcher]] = []
        if rank == 0:
            self._tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def epoch(self) -> int:
        """Current epoch; already the next one while its last batch is being trained on."""
        return self._epoch

    @property
    def step(self) -> int:
        """Optimiser steps of the current epoch whose batches have all been handed out."""
        return self._step

    @property
    def source(self) -> Source:
        """Where rows are read: the storage of the feature set, or the cache before it."""
        return self._source

    @property
    def padding_share(self) -> float:
        """Share of all windows that only fill batches up, 0 to 1."""
        return padding_share(
            self._n_windows,
            self._config.global_batch,
            self._share.parts,
            drop_last=self._config.drop_last,
        )

    def __iter__(self) -> Iterator[Batch]:
        """Yield what remains of the current epoch.

        A step that was left after some of its micro-batches begins again with the first.

        Raises:
            MovieNetError: what reading met; or the stream is used in a forked child, or its batches
                would be dealt to the ranks a second time.
            RuntimeError: the stream is closed, or this iteration is no longer the newest.
        """
        check_process(self._process)
        if self._share.world_size > 1:
            _refuse_dealer()
        self._check_open()
        self._end_iteration()
        return self._remaining(self._iteration)

    def state_dict(self) -> StreamState:
        """Return the position; the same dict on every rank.

        It counts the optimiser steps of which this stream has handed out all micro-batches, not
        what is read ahead. After the last step of an epoch it is the start of the next.
        """
        return {
            "version": STATE_VERSION,
            "epoch": self._epoch,
            "step": self._step,
            "data": self._digests["data"],
            "labels": self._digests["labels"],
            "plan": self._digests["plan"],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at ``state``; the number of ranks may differ from the run that saved it.

        Raises:
            StateError: the state is damaged, or was saved over other data, labels or plan.
        """
        if state.get("version") != STATE_VERSION:
            got = state.get("version")
            raise StateError(
                f"stream state: version: got {got!r}, want {STATE_VERSION}; begin a new run"
            )
        for name, want in self._digests.items():
            got = state.get(name)
            if got != want:
                raise StateError(
                    f"stream state: {name} digest: got {str(got)[:12]}, want {want[:12]}: "
                    f"{_HOW_TO_GO_ON[name]}, or begin a new run (another training.run)"
                )
        epoch, step = state.get("epoch", -1), state.get("step", -1)
        if not _is_position(epoch, 2**64) or not _is_position(step, self.steps_per_epoch):
            raise StateError(
                f"stream state: got epoch {epoch!r}, step {step!r}, want whole numbers, step below "
                f"{self.steps_per_epoch}; the checkpoint is damaged, take another"
            )
        self._end_iteration()
        self._epoch, self._step = epoch, step

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
        """Stop reading; no thread is left. Batches that were handed out stay good."""
        self._closed = True
        self._end_iteration()
        self._buffers.clear()
        if self._cache is not None:
            self._cache.close()

    def _remaining(self, iteration: int) -> Iterator[Batch]:
        """Generate the rest of the epoch; threads live exactly as long as this generator."""
        self._check_newest(iteration)
        epoch, first = self._epoch, self._step
        shard = self._features.index.shard
        if self._cache is not None:
            self._cache.new_epoch()
        plan = plan_epoch(self._order, self._movies, self._rows, epoch=epoch, shard=shard)
        with ExitStack() as readers:
            batches = self._read(plan, epoch, first, self._stats, readers)
            if self._partners:
                beside = plan_partners(plan, self._order, self._movies, self._rows, epoch=epoch)
                # Their windows are counted apart: they are no steps of training.
                partners = self._read(beside, epoch, first, ReadStats(), readers)
                pairs = zip(batches, partners, strict=True)
                batches = (replace(batch, partner=partner) for batch, partner in pairs)
            for batch in batches:
                if batch.last_micro:
                    self._advance(epoch, batch.step)
                yield batch
                self._check_newest(iteration)

    def _read(
        self, plan: WindowPlan, epoch: int, first: int, stats: ReadStats, readers: ExitStack
    ) -> Iterator[Batch]:
        """Begin to read this rank's batches of a plan; the threads end with ``readers``."""
        fetcher = Fetcher(
            self._features,
            self._source,
            self._buffers,
            cut=plan.cut,
            threads=self._config.threads,
            stats=stats,
            shots=self._shots,
            ahead_bytes=self._config.ahead_bytes,
        )
        readers.enter_context(fetcher)
        self._fetchers.append(weakref.ref(fetcher))
        share, prefetch = self._share, self._config.prefetch
        return _batches(fetcher, plan, self._features, share, epoch, first, prefetch)

    def _tell(self) -> None:
        logger.info(
            "stream: %d movies, %d steps an epoch, %.1f %% padding on %d ranks",
            len(self._movies),
            self.steps_per_epoch,
            100 * self.padding_share,
            self._share.world_size,
        )

    def _advance(self, epoch: int, step: int) -> None:
        done = step + 1 == self.steps_per_epoch
        self._epoch, self._step = (epoch + 1, 0) if done else (epoch, step + 1)

    def _end_iteration(self) -> None:
        """Make the running iteration stale and stop its threads."""
        self._iteration += 1
        for fetcher in filter(None, (known() for known in self._fetchers)):
            fetcher.close()
        self._fetchers.clear()

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


def score_batches(
    features: FeatureSet,
    movies: IntArray,
    *,
    frames: int | None,
    windows: int = 1,
    batch_size: int,
    stride: int = 1,
    row: Row = "frame",
    rank: int = 0,
    world_size: int = 1,
    shuffle_frames: bool = False,
    seed: int = 0,
    threads: int = 4,
    prefetch: int = 3,
    source: Source | None = None,
) -> Iterator[Batch]:
    """Yield evenly spaced windows, or the whole, of every movie, each exactly once over all ranks.

    Every rank yields the same number of batches; short ones are filled up with windows of weight 0.
    Windows come in order of position, whole movies in order of length: the longer they are, the
    fewer are in a batch. ``epoch`` and ``micro`` are 0, every batch is a step.

    Args:
        features: A sealed feature set.
        movies: int64, distinct positions in the feature index; none gives no batch.
        frames: Rows of a window; None: the whole movie.
        windows: Windows a movie, fewer where they would coincide. Of whole movies there is one, or
            with a stride as many as it has phases.
        batch_size: Windows of one batch of one rank, at most.
        stride: Every k-th frame.
        row: What a row stands for: a frame, or the mean over a shot.
        rank: 0 to ``world_size - 1``.
        world_size: Ranks that share the pass.
        shuffle_frames: Permute the rows of every movie, by (seed, movie), before cutting windows.
        seed: Seed of that permutation.
        threads: Reading threads.
        prefetch: Batches read ahead.
        source: Where rows are read, e.g. a cache; default: the storage of ``features``.

    Raises:
        DataError: a movie has no rows, or reading fails.
    """
    positions = _checked_movies(features, movies) if len(movies) else movies
    share = _checked_share(rank, world_size, 1)
    source = features.storage if source is None else source
    shots = _shots_of(features, positions, row, source)
    plan = plan_scoring(
        positions,
        features.index.rows if shots is None else shots.count_M,
        cut=Cut(frames, stride, shuffle_seed=seed if shuffle_frames else None),
        windows=windows,
        global_batch=batch_size * world_size,
        parts=world_size,
    )

    def walk() -> Iterator[Batch]:
        with Fetcher(
            features,
            source,
            _buffers(prefetch, _AHEAD_BYTES),
            cut=plan.cut,
            threads=threads,
            stats=ReadStats(),
            shots=shots,
            ahead_bytes=_AHEAD_BYTES,
        ) as fetcher:
            yield from _batches(fetcher, plan, features, share, 0, 0, prefetch)

    return walk()


def order_of(config: StreamConfig, *, shuffle_frames: bool) -> Order:
    """Return the part of the configuration that decides the order.

    Raises:
        ConfigError: a field is out of range.
    """
    return Order(
        seed=config.seed,
        frames=config.frames,
        windows_per_movie=config.windows_per_movie,
        global_batch=config.global_batch,
        drop_last=config.drop_last,
        blocks=config.blocks,
        shuffle_frames=shuffle_frames,
        sample=config.sample,
        stride=config.stride,
        row=config.row,
        pool=config.pool,
    )


def _batches(
    fetcher: Fetcher,
    plan: WindowPlan,
    features: FeatureSet,
    share: Share,
    epoch: int,
    first: int,
    prefetch: int,
) -> Iterator[Batch]:
    """Yield one rank's batches of ``plan`` from step ``first`` on."""
    from training.stream.batch import make_batch  # torch, only now that tensors are wanted

    numbers = [
        (step, micro) for step in range(first, plan.steps) for micro in range(share.accumulation)
    ]
    pieces = (plan.slice(step, share.part(micro), share.parts) for step, micro in numbers)
    for (step, micro), fetched in zip(
        numbers, fetcher.read_ahead(pieces, prefetch=prefetch), strict=True
    ):
        yield make_batch(
            fetched,
            features.labels.hot_MG,
            epoch=epoch,
            step=step,
            micro=micro,
            last_micro=micro == share.accumulation - 1,
        )


def _refuse_dealer() -> None:
    """Refuse to be iterated by what deals batches to ranks, since ours are dealt already.

    Accelerate makes it of a ``DataLoader`` around an iterable; nobody tells the iterable, so the
    callers are looked at.

    Raises:
        ConfigError: one of them is such a dealer.
    """
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        dealer = type(frame.f_locals.get("self")).__name__
        if frame.f_globals.get("__name__") == "accelerate.data_loader" and dealer in _DEALERS:
            raise ConfigError(
                f"stream: got iterated by Accelerate's {dealer}, which would deal its batches to "
                "the ranks again; want the stream itself given to prepare(), which returns it as "
                "it is (a DataLoader around it, even with dispatch_batches=False, stays out of "
                "prepare())"
            )


def _buffers(prefetch: int, ahead_bytes: int, *, pinned: bool = False) -> Buffers:
    if pinned:
        from training.stream.batch import PinnedBuffers

        return PinnedBuffers()
    return Ring(keep=prefetch + 2, keep_bytes=ahead_bytes)


def _shots_of(features: FeatureSet, movies: IntArray, row: Row, source: Source) -> Shots | None:
    if row == "frame":
        return None
    from training.stream.shots import Shots

    return Shots.of(features, movies, source)


def _checked_movies(features: FeatureSet, movies: IntArray) -> IntArray:
    positions = movie_set(movies)
    where = features.storage.location
    if not len(positions):
        raise DataError(f"{where}: got no movies to read; is the split empty?")
    if positions[-1] >= len(features.index.rows):
        raise ValueError(f"movies: got {positions[-1]}, want below {len(features.index.rows)}")
    empty = positions[features.index.rows[positions] == 0]
    if len(empty):
        raise DataError(
            f"{where}: movie {features.movie_ids[empty[0]]} has no rows ({len(empty)} such movies);"
            " leave them out of the split"
        )
    return positions


def _checked_share(rank: int, world_size: int, accumulation: int) -> Share:
    if world_size < 1 or not 0 <= rank < world_size or accumulation < 1:
        raise ValueError(
            f"got rank {rank} of {world_size} with accumulation {accumulation}, want a rank from 0 "
            "to below the world size, and accumulation of at least 1"
        )
    return Share(rank, world_size, accumulation)


def _is_position(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit
