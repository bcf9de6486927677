"""What an epoch would read and hold, told from the index: no feature is read.

Where rows stand for shots, their places are read as the stream itself does when it is made: 4 bytes
a frame, which no figure of the epoch counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.units import format_bytes
from sharding.storage.base import Range
from training.stream.base import order_of
from training.stream.cache import PIECE_BYTES, cache_path, is_rolling, limit_of, room_of
from training.stream.fetch import neighbours
from training.stream.plan import (
    IntArray,
    Slice,
    WindowPlan,
    covering_runs,
    plan_epoch,
    plan_partners,
)
from training.stream.shots import Shots

if TYPE_CHECKING:
    from pathlib import Path

    from configs.schema import StreamConfig
    from sharding.features import FeatureSet

N_FIRST = 4
"""Windows of the first global batch that are shown."""


class FirstWindow(NamedTuple):
    """One window of the first global batch."""

    movie: str
    start: int
    end: int
    """One past its last row."""


@dataclass(frozen=True)
class Traffic:
    """What one node asks of the source in one epoch, over all its ranks."""

    requests: int
    n_bytes: int
    hit_rate: float
    """Share of ranges that the cache serves, 0 to 1."""


@dataclass(frozen=True)
class Preview:
    """An epoch, before it is read."""

    windows: int
    steps: int
    global_batch: int
    world_size: int
    accumulation: int
    batch_size: int
    """Windows a rank gets at once; of whole movies the most."""

    padding_share: float
    """Share of windows that only fill batches up."""

    real_share: float
    """Share of rows that are real frames; the rest is masked."""

    requests: int
    """Ranged reads of all ranks, padding included."""

    n_bytes: int
    """Bytes they read, padding included."""

    ranks_per_node: int
    cache: Path | None
    """Folder of the cache on each node."""

    cache_limit: int
    """Its room in bytes."""

    cached_bytes: int
    """Bytes of the shards that find room in it."""

    first: Traffic
    """Of the first node in the first epoch: with a cache the most, since a range is a miss until
    its shard is there."""

    later: Traffic
    """Of the first node in a later epoch; where the cache evicts, the least."""

    buffer_bytes: int
    """Memory of one rank's batch buffers at most, and of the piece that it admits to the cache."""

    plan_bytes: int
    """Memory of the index, of shots and of an epoch's plan, each rank."""

    digest: str
    """Of the plan: a run can be resumed where it is the same."""

    windows_first: tuple[FirstWindow, ...]
    """The first windows of epoch 0."""

    @property
    def text(self) -> str:
        """The preview in lines of a name and its figures."""
        first = "  ".join(f"{each.movie}[{each.start}:{each.end}]" for each in self.windows_first)
        room = f"room {format_bytes(self.cache_limit)}, takes {format_bytes(self.cached_bytes)}"
        return "\n".join(
            (
                f"epoch       {self.windows:,} windows   {self.steps:,} steps of "
                f"{self.global_batch}   {self.requests:,} reads, {format_bytes(self.n_bytes)}   "
                f"rows {self.real_share:.1%} real, the rest masked",
                f"ranks       {self.world_size} x {self.accumulation} micro-batches of "
                f"{self.batch_size} windows   padding {self.padding_share:.1%}",
                f"node        {self.ranks_per_node} ranks   first epoch {_told(self.first)}   "
                f"later {_told(self.later)}",
                f"cache       {f'{self.cache}   {room}' if self.cache else 'none'}",
                f"memory      batches {format_bytes(self.buffer_bytes)}   index and plan "
                f"{format_bytes(self.plan_bytes)}   (each rank)",
                f"order       {self.digest[:12]}   first {first}",
            )
        )


def _told(traffic: Traffic) -> str:
    figures = f"{traffic.requests:,} requests, {format_bytes(traffic.n_bytes)}"
    return f"{figures}, {traffic.hit_rate:.1%} hits"


def preview(
    features: FeatureSet,
    movies: IntArray,
    config: StreamConfig,
    *,
    world_size: int = 1,
    ranks_per_node: int | None = None,
    accumulation: int = 1,
    shuffle_frames: bool = False,
    partners: bool = False,
) -> Preview:
    """Return what ``FeatureStream`` with the same arguments would do in its first epoch.

    Args:
        features: A sealed feature set; its index is looked at, and where shots begin if rows stand
            for them.
        movies: int64, distinct positions in the feature index.
        config: How it would be read.
        world_size: Ranks.
        ranks_per_node: Of them on one node, which share a cache; default: all.
        accumulation: Micro-batches of an optimiser step.
        shuffle_frames: Permute the rows of every movie.
        partners: Read a window of another movie beside each; what is read and held counts them,
            windows and steps do not.

    Raises:
        ConfigError: the order is out of range.
        DataError: rows stand for shots, and the set does not tell those of a movie.
    """
    order, index = order_of(config, shuffle_frames=shuffle_frames), features.index
    on_node = min(ranks_per_node or world_size, world_size)
    shots = None if config.row == "frame" else Shots.of(features, movies, features.storage)
    rows = index.rows if shots is None else shots.count_M
    plan = plan_epoch(order, movies, rows, epoch=0, shard=index.shard)
    beside = [plan_partners(plan, order, movies, rows, epoch=0)] if partners else []
    parts, row_bytes = world_size * accumulation, features.dim * 2
    reads = _Reads(features, plan, shots)

    def slices(plans: Sequence[WindowPlan], ranks: int) -> list[Slice]:
        return [
            each.slice(step, micro * world_size + rank, parts)
            for step in range(plan.steps)
            for micro in range(accumulation)
            for rank in range(ranks)
            for each in plans
        ]

    every, node = slices([plan], world_size), slices([plan, *beside], on_node)
    total, here = reads.sum([*every, *slices(beside, world_size)]), reads.sum(node)
    path = cache_path(features, config)
    limit = 0 if path is None else limit_of(path, config.max_bytes)
    kept, first, later = _cached(features, reads, node, here, limit, config.blocks)
    places = sum(len(piece.movie) * _n_rows(piece, plan.cut.frames) for piece in every)
    plans = (plan, *beside)
    columns: list[NDArray[Any]] = [index.shard, index.offset, index.rows]
    columns += [column for each in plans for column in (each.movie, each.visit, each.start)]
    buffers = [
        _buffer_bytes(_largest(slices([each], world_size), each) * row_bytes, config)
        for each in plans
    ]
    return Preview(
        windows=len(plan.movie),
        steps=plan.steps,
        global_batch=config.global_batch,
        world_size=world_size,
        accumulation=accumulation,
        batch_size=max((len(piece.movie) for piece in every), default=0),
        padding_share=1 - len(plan.movie) / max(1, sum(len(piece.movie) for piece in every)),
        real_share=sum(int(piece.length.sum()) for piece in every) / max(1, places),
        requests=total.requests,
        n_bytes=total.n_bytes,
        ranks_per_node=on_node,
        cache=path,
        cache_limit=limit,
        cached_bytes=kept,
        first=first,
        later=later,
        buffer_bytes=sum(buffers) + (PIECE_BYTES if path else 0),
        plan_bytes=sum(column.nbytes for column in columns) + (shots.n_bytes if shots else 0),
        digest=order.digest(movies),
        windows_first=tuple(
            FirstWindow(features.movie_ids[movie], start, start + real)
            for movie, start, real in zip(
                plan.movie[:N_FIRST].tolist(),
                plan.start[:N_FIRST].tolist(),
                plan.length[:N_FIRST].tolist(),
                strict=True,
            )
        ),
    )


class _Sum(NamedTuple):
    ranges: int
    requests: int
    n_bytes: int


@dataclass(frozen=True)
class _Reads:
    """How windows are read."""

    features: FeatureSet
    plan: WindowPlan
    shots: Shots | None

    def sum(self, pieces: Sequence[Slice], *, shards: NDArray[np.bool_] | None = None) -> _Sum:
        """Add up the reads of windows, of those in ``shards`` (``[S]`` bool) alone."""
        total = np.zeros(3, np.int64)
        for piece in pieces:
            inside = np.ones(len(piece.movie), bool)
            if shards is not None:
                inside = shards[self.features.index.shard[piece.movie]]
            total += self._of(piece, inside)
        return _Sum(*total.tolist())

    def _of(self, piece: Slice, inside: NDArray[np.bool_]) -> IntArray:
        chosen = np.flatnonzero(inside)
        if not len(chosen):
            return np.zeros(3, np.int64)
        if self.plan.cut.contiguous and self.shots is None:
            return self._windows(piece, chosen)
        return sum((self._gathered(piece, k) for k in chosen.tolist()), np.zeros(3, np.int64))

    def _windows(self, piece: Slice, chosen: IntArray) -> IntArray:
        """Count windows of neighbouring rows; an object store reads some of them as one."""
        storage, index, row_bytes = self.features.storage, self.features.index, self._row_bytes
        movie, size = piece.movie[chosen], piece.length[chosen] * row_bytes
        first = index.offset[movie].astype(np.int64) + piece.start[chosen] * row_bytes
        near = np.lexsort((first, index.shard[movie]))
        together = [slice(k, k + 1) for k in range(len(chosen))]
        if storage.readers is not None:
            names = index.shard[movie[near]].astype(str).tolist()
            ranges = list(map(Range, names, first[near].tolist()))
            together = neighbours(ranges, size[near].tolist(), storage.near_bytes)
        begins = np.array([first[near[some]].min() for some in together])
        ends = np.array([(first + size)[near[some]].max() for some in together])
        return np.array([len(chosen), *self._requests(begins, ends)], np.int64)

    def _gathered(self, piece: Slice, k: int) -> IntArray:
        """Count a window of rows that do not lie side by side."""
        movie, visit, start = (int(each[k]) for each in (piece.movie, piece.visit, piece.start))
        if self.shots is None:
            n_rows = int(self.features.index.rows[movie])
            rows_N = self.plan.cut.rows(movie, visit, start, n_rows)
        else:
            n_shots = int(self.shots.count_M[movie])
            rows_N, _ = self.shots.rows(movie, self.plan.cut.rows(movie, visit, start, n_shots))
        near_rows = 1 + self.features.storage.near_bytes // self._row_bytes
        begins, ends = covering_runs(rows_N, near_rows)
        counts = self._requests(begins * self._row_bytes, ends * self._row_bytes)
        return np.array([len(begins), *counts], np.int64)

    def _requests(self, begins: IntArray, ends: IntArray) -> tuple[int, int]:
        n_bytes = ends - begins
        a_request = self.features.storage.request_bytes or n_bytes.max()
        return int((-(-n_bytes // a_request)).sum()), int(n_bytes.sum())

    @property
    def _row_bytes(self) -> int:
        return self.features.dim * 2


def _cached(
    features: FeatureSet,
    reads: _Reads,
    node: Sequence[Slice],
    here: _Sum,
    limit: int,
    blocks: int,
) -> tuple[int, Traffic, Traffic]:
    """Return the bytes that the cache takes, and a node's traffic in its first and later epochs."""
    sizes = np.array([shard.n_bytes for shard in features.manifest.shards], np.int64)
    a_request = min(features.storage.request_bytes or PIECE_BYTES, PIECE_BYTES)
    asked = [np.unique(features.index.shard[piece.movie]) for piece in node]
    order = list(dict.fromkeys(np.concatenate(asked).tolist())) if asked else []
    kept, room = np.zeros(len(sizes), bool), limit
    for shard in order:
        if room_of(int(sizes[shard])) <= room:
            kept[shard] = True
            room -= room_of(int(sizes[shard]))
    if not kept.all() and is_rolling(sizes.tolist(), blocks, limit):
        # All pass through it, once an epoch; the first range of each is a miss.
        brought = sizes[order]
        most = _with_shards(here, here, brought, a_request)
        least = _with_shards(here, _Sum(len(order), len(order), 0), brought, a_request)
        return min(limit, int(brought.sum())), most, least
    later = _with_shards(here, reads.sum(node, shards=~kept), sizes[:0], a_request)
    return int(sizes[kept].sum()), _with_shards(here, here, sizes[kept], a_request), later


def _with_shards(here: _Sum, missed: _Sum, brought: IntArray, a_request: int) -> Traffic:
    """Return a node's traffic: what it missed, and the complete shards that were cached."""
    return Traffic(
        missed.requests + int((-(-brought // a_request)).sum()),
        missed.n_bytes + int(brought.sum()),
        1 - missed.ranges / max(1, here.ranges),
    )


def _largest(pieces: Sequence[Slice], plan: WindowPlan) -> int:
    return max((len(each.movie) * _n_rows(each, plan.cut.frames) for each in pieces), default=0)


def _buffer_bytes(largest: int, config: StreamConfig) -> int:
    """Return the memory of batches under way, and of the one before them that is still in use."""
    under_way = min((config.prefetch + 1) * largest, max(config.ahead_bytes, largest))
    return under_way + largest


def _n_rows(piece: Slice, frames: int | None) -> int:
    return int(piece.length.max()) if frames is None else frames
