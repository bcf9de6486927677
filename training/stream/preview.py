"""What an epoch would read and hold, computed from the index: no feature is read.

Where rows represent shots, their places are read as by the stream itself when it is created: 4
bytes per frame, which no figure of the epoch counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.units import format_bytes
from training.stream.base import order_of
from training.stream.cache import PIECE_BYTES, cache_path, is_rolling, limit_of, room_of
from training.stream.epoch_plan import IntArray, Slice, WindowPlan, plan_epoch, plan_partners
from training.stream.read_plan import ReadPlanner, Requests
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
    """What one node requests of the source in one epoch, over all its ranks."""

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
    """Of the first node in the first epoch. With a cache an upper bound, since a range is a miss
    until its shard has arrived."""

    later: Traffic
    """Of the first node in a later epoch; where the cache evicts, a lower bound."""

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
        """The preview as lines, each a name and its figures."""
        first = "  ".join(f"{each.movie}[{each.start}:{each.end}]" for each in self.windows_first)
        usage = f"room {format_bytes(self.cache_limit)}, takes {format_bytes(self.cached_bytes)}"
        return "\n".join(
            (
                f"epoch       {self.windows:,} windows   {self.steps:,} steps of "
                f"{self.global_batch}   {self.requests:,} reads, {format_bytes(self.n_bytes)}   "
                f"rows {self.real_share:.1%} real, the rest masked",
                f"ranks       {self.world_size} x {self.accumulation} micro-batches of "
                f"{self.batch_size} windows   padding {self.padding_share:.1%}",
                f"node        {self.ranks_per_node} ranks   first epoch {_figures(self.first)}   "
                f"later {_figures(self.later)}",
                f"cache       {f'{self.cache}   {usage}' if self.cache else 'none'}",
                f"memory      batches {format_bytes(self.buffer_bytes)}   index and plan "
                f"{format_bytes(self.plan_bytes)}   (each rank)",
                f"order       {self.digest[:12]}   first {first}",
            )
        )


def _figures(traffic: Traffic) -> str:
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
        features: A sealed feature set. Only its index is used, and where shots begin if rows
            represent shots.
        movies: int64 ``[N]``, distinct positions in the feature index.
        config: How it would be read.
        world_size: Ranks.
        ranks_per_node: Ranks of one node, which share a cache; default: all.
        accumulation: Micro-batches of an optimizer step.
        shuffle_frames: Permute the rows of every movie.
        partners: Also read a window of another movie for each window. Requests, bytes and memory
            include them, windows and steps do not.

    Raises:
        ConfigError: the order is out of range.
        DataError: rows represent shots, and the set does not contain those of a movie.
    """
    order, index = order_of(config, shuffle_frames=shuffle_frames), features.index
    shots = None if config.unit == "frame" else Shots.of(features, movies, features.storage)
    rows = index.rows if shots is None else shots.count_M
    plan = plan_epoch(order, movies, rows, epoch=0, shard=index.shard)
    others = [plan_partners(plan, order, movies, rows, epoch=0)] if partners else []
    epoch = _Epoch(
        features=features,
        config=config,
        digest=order.digest(movies),
        plans=(plan, *others),
        planner=ReadPlanner.of(features, features.storage, plan.spec, shots),
        world_size=world_size,
        ranks_per_node=min(ranks_per_node or world_size, world_size),
        accumulation=accumulation,
    )
    return epoch.preview()


@dataclass(frozen=True, eq=False)
class _Epoch:
    """Epoch 0 as all ranks would read it."""

    features: FeatureSet
    config: StreamConfig
    digest: str
    plans: tuple[WindowPlan, ...]
    """Of the windows, and of their partners."""

    planner: ReadPlanner
    world_size: int
    ranks_per_node: int
    accumulation: int

    def preview(self) -> Preview:
        plan, pieces = self.plans[0], self.slices(self.plans[0], self.world_size)
        places = sum(len(piece.movie) for piece in pieces)
        place_rows = sum(len(piece.movie) * _n_rows(piece, plan.spec.window) for piece in pieces)
        requests = [each for one in self.plans for each in self.requests(one, self.world_size)]
        total = _sum_of(requests, self.request_bytes)
        path = cache_path(self.features, self.config)
        limit = 0 if path is None else limit_of(path, self.config.cache_bytes)
        cached_bytes, first, later = self.node_traffic(limit)
        return Preview(
            windows=len(plan.movie),
            steps=plan.steps,
            global_batch=self.config.global_batch,
            world_size=self.world_size,
            accumulation=self.accumulation,
            batch_size=max((len(piece.movie) for piece in pieces), default=0),
            padding_share=1 - len(plan.movie) / max(1, places),
            real_share=sum(int(piece.length.sum()) for piece in pieces) / max(1, place_rows),
            requests=total.requests,
            n_bytes=total.n_bytes,
            ranks_per_node=self.ranks_per_node,
            cache=path,
            cache_limit=limit,
            cached_bytes=cached_bytes,
            first=first,
            later=later,
            buffer_bytes=self.buffer_bytes() + (PIECE_BYTES if path else 0),
            plan_bytes=self.plan_bytes(),
            digest=self.digest,
            windows_first=self.first_windows(),
        )

    def slices(self, plan: WindowPlan, ranks: int) -> list[Slice]:
        """Return the slices of the first ``ranks`` ranks in the order in which they are read."""
        parts = self.world_size * self.accumulation
        return [
            plan.slice(step, micro * self.world_size + rank, parts)
            for step in range(plan.steps)
            for micro in range(self.accumulation)
            for rank in range(ranks)
        ]

    def requests(self, plan: WindowPlan, ranks: int) -> list[Requests]:
        """Return what the source receives from the first ``ranks`` ranks, by slice."""
        return [self.planner.requests(piece) for piece in self.slices(plan, ranks)]

    @property
    def request_bytes(self) -> int | None:
        """Bytes at which the source splits a request; None: never."""
        return self.features.storage.request_bytes

    def node_traffic(self, limit: int) -> tuple[int, Traffic, Traffic]:
        """Return the bytes that a cache admits, and a node's traffic in first and later epochs."""
        # Partners are read together with their windows: a shard is admitted at its first use.
        by_plan = [self.requests(plan, self.ranks_per_node) for plan in self.plans]
        node = [each for together in zip(*by_plan, strict=True) for each in together]
        here = _sum_of(node, self.request_bytes)
        sizes = np.array([shard.n_bytes for shard in self.features.manifest.shards], np.int64)
        order = _first_uses(node)
        is_kept = _admitted(sizes, order, limit)
        if not is_kept.all() and is_rolling(
            sizes.tolist(), self.config.shuffle_block_shards, limit
        ):
            # Every shard passes through the cache once per epoch. At best only the first range of
            # each is a miss, at worst the download never catches up with the reads.
            downloaded = sizes[order]
            most = _traffic(here, here, downloaded, self.request_bytes)
            fewest = _Sum(len(order), len(order), 0)
            least = _traffic(here, fewest, downloaded, self.request_bytes)
            return min(limit, int(downloaded.sum())), most, least
        missed = _sum_of(node, self.request_bytes, shards=~is_kept)
        first = _traffic(here, here, sizes[is_kept], self.request_bytes)
        later = _traffic(here, missed, sizes[:0], self.request_bytes)
        return int(sizes[is_kept].sum()), first, later

    def buffer_bytes(self) -> int:
        """Return the memory of batches being read, and of the one before them still in use."""
        total = 0
        for plan in self.plans:
            places = (
                len(piece.movie) * _n_rows(piece, plan.spec.window)
                for piece in self.slices(plan, self.world_size)
            )
            largest = max(places, default=0) * self.planner.row_bytes
            # ``ahead_bytes`` limits what is read ahead, except for the one batch that always is.
            ahead = max(self.config.prefetch_bytes, largest)
            total += min((self.config.prefetch + 1) * largest, ahead) + largest
        return total

    def plan_bytes(self) -> int:
        """Return the memory of index, shots and plans."""
        index, shots = self.features.index, self.planner.shots
        columns: list[NDArray[Any]] = [index.shard, index.offset, index.rows]
        columns += [
            column for each in self.plans for column in (each.movie, each.window_index, each.start)
        ]
        return sum(column.nbytes for column in columns) + (shots.n_bytes if shots else 0)

    def first_windows(self) -> tuple[FirstWindow, ...]:
        """Return the first windows of the first global batch."""
        plan = self.plans[0]
        columns = (column[:N_FIRST].tolist() for column in (plan.movie, plan.start, plan.length))
        return tuple(
            FirstWindow(self.features.movie_ids[movie], start, start + length)
            for movie, start, length in zip(*columns, strict=True)
        )


class _Sum(NamedTuple):
    ranges: int
    requests: int
    n_bytes: int


def _sum_of(
    reads: Sequence[Requests],
    request_bytes: int | None,
    *,
    shards: NDArray[np.bool_] | None = None,
) -> _Sum:
    """Add up requests, only those to ``shards`` (bool, by number of the shard) if given."""
    total = np.zeros(3, np.int64)
    for shard_Q, n_bytes_Q, ranges_Q in reads:
        if shards is not None:
            inside_Q = shards[shard_Q]
            n_bytes_Q, ranges_Q = n_bytes_Q[inside_Q], ranges_Q[inside_Q]
        split_Q = 1 if request_bytes is None else -(-n_bytes_Q // request_bytes)
        requests = int(np.broadcast_to(split_Q, n_bytes_Q.shape).sum())
        total += (int(ranges_Q.sum()), requests, int(n_bytes_Q.sum()))
    return _Sum(*total.tolist())


def _first_uses(reads: Sequence[Requests]) -> list[int]:
    """Return the shards in the order in which they are first read; by number within a slice."""
    used = [np.unique(each.shard_Q) for each in reads]
    return list(dict.fromkeys(np.concatenate(used).tolist())) if used else []


def _admitted(sizes: IntArray, order: Sequence[int], limit: int) -> NDArray[np.bool_]:
    """Return whether each shard finds space in a cache of ``limit`` bytes that evicts none."""
    is_kept, free = np.zeros(len(sizes), bool), limit
    for shard in order:
        needed = room_of(int(sizes[shard]))
        if needed <= free:
            is_kept[shard] = True
            free -= needed
    return is_kept


def _traffic(here: _Sum, missed: _Sum, downloaded: IntArray, request_bytes: int | None) -> Traffic:
    """Return a node's traffic: the reads that it missed, and the shards that it downloaded."""
    # The cache downloads a shard piece by piece.
    request_bytes = min(request_bytes or PIECE_BYTES, PIECE_BYTES)
    return Traffic(
        missed.requests + int((-(-downloaded // request_bytes)).sum()),
        missed.n_bytes + int(downloaded.sum()),
        1 - missed.ranges / max(1, here.ranges),
    )


def _n_rows(piece: Slice, frames: int | None) -> int:
    """Return T, the padded rows of each window of a slice."""
    return int(piece.length.max()) if frames is None else frames
