"""Streams of batches: training epochs that resume at any step, and one pass for scoring.

A stream is not a torch ``DataLoader``: it has no worker processes and no collating. In a plain
loop::

    with FeatureStream(features, movies, config, rank=rank, world_size=world) as stream:
        for batch in stream:  # the rest of the epoch
            batch = batch.to(device)
            logits = model(batch.features.float(), batch.mask)
            loss = (batch.weight * loss_B(logits, batch.labels)).sum() * world / batch.global_weight
            ...
            checkpoint["stream"] = stream.state_dict()
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING

from configs.errors import ConfigError
from configs.runtime.world import World
from training.stream.base import BatchStream, Share, checked_movies, checked_share, order_of
from training.stream.cache import open_cache
from training.stream.cursor import Digests, EpochCursor
from training.stream.epoch_plan import (
    IntArray,
    Slice,
    Unit,
    WindowPlan,
    count_steps,
    padding_share,
    plan_epoch,
    plan_partners,
    plan_scoring,
    slice_size,
)
from training.stream.reader import BufferPool, Buffers, Pace, ReadStats, WindowReader, never

if TYPE_CHECKING:
    from configs.schema import StreamConfig
    from sharding.features import FeatureSet
    from sharding.storage.base import RangeReader
    from training.stream.batch import Batch
    from training.stream.shots import Shots
    from training.stream.view import View

logger = logging.getLogger(__name__)

_PREFETCH_BYTES = 1024**3

_ALONE = World()


class FeatureStream(BatchStream):
    """Epochs of training windows for one rank, read through the feature index.

    Iterating yields the rest of the current epoch; the next iteration is the next epoch. Every rank
    yields the same number of batches. Only the latest iteration is valid.

    Args:
        features: A sealed feature set; closing the stream does not close it.
        movies: int64 ``[N]``, distinct positions in the feature index.
        config: The ``stream`` section of the configuration.
        rank: 0 to ``world_size - 1``.
        world_size: Ranks that share each global batch.
        accumulation: Micro-batches per optimizer step.
        shuffle_frames: Permute the rows of every movie by (seed, movie) before windows are cut.
        partners: Also read a window of another movie for each window, as ``batch.partner``.
        source: Reader of the rows; default: the storage of ``features``, or a cache in front of it.
        pinned: Read into pinned memory, from which ``batch.to(device, non_blocking=True)`` copies
            asynchronously.
        give_up: Asked while a batch is late; True ends the wait with ``AbandonedError``.

    Raises:
        ConfigError: an epoch would have no step, or a setting of the order is out of range.
        DataError: there are no movies, or a movie has no rows.
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
        source: RangeReader | None = None,
        pinned: bool = False,
        give_up: Callable[[], bool] = never,
    ) -> None:
        self._features, self._config, self._partners = features, config, partners
        self._give_up = give_up
        self._cache = None if source else open_cache(features, config, log=rank == 0)
        source = source or self._cache or features.storage
        self._movies = checked_movies(features, movies)
        share = checked_share(rank, world_size, accumulation)
        self._order = order_of(config, shuffle_frames=shuffle_frames)
        if rank == 0 and config.unit == "shot":  # one request per movie may take a while
            logger.info("stream: reading the shots of %s movies", f"{len(self._movies):,}")
        self._shots = _shots_of(features, self._movies, config.unit, source)
        self._rows = features.index.rows if self._shots is None else self._shots.count_M
        self._n_windows = self._order.n_windows(self._rows[self._movies])
        self.batch_size = slice_size(self._n_windows, config.global_batch, share.n_slices)
        digests = Digests(
            data=features.digest,
            labels=features.labels.digest,
            plan=self._order.digest(self._movies),
        )
        super().__init__(EpochCursor(self._count_steps(), digests), share, source)
        self._buffers = _buffers(config.prefetch, config.prefetch_bytes, pinned=pinned)
        self._pace = Pace()
        self._readers: list[weakref.ref[WindowReader]] = []
        if rank == 0:
            self._log_epoch(len(self._movies))

    @property
    def padding_share(self) -> float:
        """Share of windows that are padding, 0 to 1."""
        return padding_share(
            self._n_windows,
            self._config.global_batch,
            self._share.n_slices,
            drop_last=self._config.drop_last,
        )

    def close(self) -> None:
        """Stop reading and all threads. Batches that were yielded remain valid."""
        super().close()
        self._buffers.clear()
        if self._cache is not None:
            self._cache.close()

    def _count_steps(self) -> int:
        global_batch, drop_last = self._config.global_batch, self._config.drop_last
        steps = count_steps(self._n_windows, global_batch, drop_last=drop_last)
        if not steps:
            raise ConfigError(
                f"stream.global_batch: got {global_batch} with drop_last, want at most "
                f"{self._n_windows}, the number of windows per epoch"
            )
        return steps

    def _read_epoch(self, epoch: int, first_step: int) -> Generator[Batch, None, None]:
        if self._cache is not None:
            self._cache.new_epoch()
        shard = self._features.index.shard
        plan = plan_epoch(self._order, self._movies, self._rows, epoch=epoch, shard=shard)
        with ExitStack() as readers:
            batches = self._read(plan, epoch, first_step, self._stats, readers, self._pace)
            if self._partners:
                others = plan_partners(plan, self._order, self._movies, self._rows, epoch=epoch)
                # Separate statistics: partners do not count as training windows.
                partners = self._read(others, epoch, first_step, ReadStats(), readers, Pace())
                pairs = zip(batches, partners, strict=True)
                batches = (replace(batch, partner=partner) for batch, partner in pairs)
            yield from batches

    def _read(
        self,
        plan: WindowPlan,
        epoch: int,
        first_step: int,
        stats: ReadStats,
        readers: ExitStack,
        pace: Pace,
    ) -> Iterator[Batch]:
        """Start reading this rank's batches of a plan; the threads end with ``readers``."""
        reader = WindowReader(
            self._features,
            self._source,
            self._buffers,
            spec=plan.spec,
            threads=self._config.threads,
            stats=stats,
            shots=self._shots,
            prefetch_bytes=self._config.prefetch_bytes,
            pace=pace,
            give_up=self._give_up,
        )
        readers.enter_context(reader)
        # Weak: an abandoned iteration has closed its reader, which must not be kept alive here.
        self._readers.append(weakref.ref(reader))
        share, prefetch = self._share, self._config.prefetch
        return _batches(reader, plan, self._features, share, epoch, first_step, prefetch)

    def _stop_reading(self) -> None:
        for reader in filter(None, (reference() for reference in self._readers)):
            reader.close()
        self._readers.clear()


def score_batches(
    features: FeatureSet,
    movies: IntArray,
    view: View,
    *,
    batch_size: int,
    world: World = _ALONE,
    threads: int = 4,
    prefetch: int = 3,
    source: RangeReader | None = None,
    give_up: Callable[[], bool] = never,
) -> Iterator[Batch]:
    """Yield the windows of every movie as defined by ``view``, each exactly once over all ranks.

    Every rank yields the same number of batches; short batches are padded with windows of weight 0.
    Windows are in order of position, complete movies in order of length: the longer the movies, the
    fewer are in a batch. ``epoch`` and ``micro`` are 0, and every batch is a step.

    Args:
        features: A sealed feature set.
        movies: int64 ``[N]``, distinct positions in the feature index; no movies, no batches.
        view: Windows of each movie.
        batch_size: Maximum number of windows per batch and rank.
        world: Ranks that share the pass.
        threads: Reading threads.
        prefetch: Batches read ahead.
        source: Reader of the rows, e.g. a cache; default: the storage of ``features``.
        give_up: Asked while a batch is late; True ends the wait with ``AbandonedError``.

    Raises:
        DataError: a movie has no rows, or reading fails.
    """
    positions = checked_movies(features, movies) if len(movies) else movies
    share = checked_share(world.rank, world.size, 1)
    source = features.storage if source is None else source
    shots = _shots_of(features, positions, view.row, source)
    plan = plan_scoring(
        positions,
        features.index.rows if shots is None else shots.count_M,
        spec=view.spec,
        windows=view.windows,
        global_batch=batch_size * world.size,
        n_slices=world.size,
    )
    return _score(features, plan, share, shots, source, threads, prefetch, give_up)


def _score(
    features: FeatureSet,
    plan: WindowPlan,
    share: Share,
    shots: Shots | None,
    source: RangeReader,
    threads: int,
    prefetch: int,
    give_up: Callable[[], bool],
) -> Iterator[Batch]:
    """Yield the batches of a scoring plan; the threads start with the first batch."""
    with WindowReader(
        features,
        source,
        _buffers(prefetch, _PREFETCH_BYTES),
        spec=plan.spec,
        threads=threads,
        stats=ReadStats(),
        shots=shots,
        prefetch_bytes=_PREFETCH_BYTES,
        give_up=give_up,
    ) as reader:
        yield from _batches(reader, plan, features, share, 0, 0, prefetch)


def _batches(
    reader: WindowReader,
    plan: WindowPlan,
    features: FeatureSet,
    share: Share,
    epoch: int,
    first_step: int,
    prefetch: int,
) -> Iterator[Batch]:
    """Yield one rank's batches of ``plan`` from ``first_step`` on."""
    # torch, imported only when tensors are needed
    from training.stream.batch import add_features, plan_batch

    hot_MG, accumulation = features.labels.hot_MG, share.accumulation
    planned: deque[Batch] = deque()

    def pieces() -> Iterator[Slice]:
        for step in range(first_step, plan.steps):
            for micro in range(accumulation):
                piece = plan.slice(step, share.slice_index(micro), share.n_slices)
                planned.append(
                    plan_batch(
                        piece,
                        reader.n_rows(piece),
                        hot_MG,
                        epoch=epoch,
                        step=step,
                        micro=micro,
                        last_micro=micro == accumulation - 1,
                    )
                )
                yield piece

    with closing(reader.read_ahead(pieces(), prefetch=prefetch)) as slices:
        for _ in range(first_step * accumulation, plan.steps * accumulation):
            # No name and no zip keeps the slice: its buffer may be filled with the next one.
            yield add_features(next(slices), planned.popleft())


def _buffers(prefetch: int, prefetch_bytes: int, *, pinned: bool = False) -> Buffers:
    if pinned:
        from training.stream.batch import PinnedBuffers

        return PinnedBuffers()
    # The batches read ahead, the one being filled, and the one in use by the consumer.
    return BufferPool(keep=prefetch + 2, keep_bytes=prefetch_bytes)


def _shots_of(
    features: FeatureSet, movies: IntArray, unit: Unit, source: RangeReader
) -> Shots | None:
    if unit == "frame":
        return None
    from training.stream.shots import Shots

    return Shots.of(features, movies, source)
