"""What an epoch would read and hold, told from the index alone: no feature is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from configs.units import format_bytes
from training.stream.loader import order_of
from training.stream.plan import (
    IntArray,
    count_steps,
    frame_order,
    padding_share,
    plan_epoch,
    slice_size,
)

if TYPE_CHECKING:
    from configs.schema import StreamConfig
    from sharding.features import FeatureSet
    from training.stream.plan import Order, WindowPlan

N_FIRST = 4
"""Windows of the first global batch that are shown."""


class FirstWindow(NamedTuple):
    """One window of the first global batch."""

    movie: str
    start: int
    end: int
    """One past its last row."""


@dataclass(frozen=True)
class Preview:
    """An epoch, before it is read."""

    windows: int
    steps: int
    global_batch: int
    world_size: int
    accumulation: int
    batch_size: int
    """Windows a rank gets at once."""

    padding_share: float
    """Share of windows that only fill batches up."""

    real_share: float
    """Share of rows that are real frames; the rest is masked."""

    requests: int
    """Ranged reads of all ranks, padding included."""

    n_bytes: int
    """Bytes they read, padding left out."""

    buffer_bytes: int
    """Memory of one rank's batch buffers."""

    plan_bytes: int
    """Memory of the index and of an epoch's plan, each rank."""

    digest: str
    """Of the plan: a run can be resumed where it is the same."""

    first: tuple[FirstWindow, ...]
    """The first windows of epoch 0."""

    @property
    def text(self) -> str:
        """The preview in lines of a name and its figures."""
        first = "  ".join(f"{each.movie}[{each.start}:{each.end}]" for each in self.first)
        return "\n".join(
            (
                f"epoch       {self.windows:,} windows   {self.steps:,} steps of "
                f"{self.global_batch}   {self.requests:,} reads, {format_bytes(self.n_bytes)}   "
                f"rows {self.real_share:.1%} real, the rest masked",
                f"ranks       {self.world_size} x {self.accumulation} micro-batches of "
                f"{self.batch_size} windows   padding {self.padding_share:.1%}",
                f"memory      batches {format_bytes(self.buffer_bytes)}   index and plan "
                f"{format_bytes(self.plan_bytes)}   (each rank)",
                f"order       {self.digest[:12]}   first {first}",
            )
        )


def preview(
    features: FeatureSet,
    movies: IntArray,
    config: StreamConfig,
    *,
    world_size: int = 1,
    accumulation: int = 1,
    shuffle_frames: bool = False,
) -> Preview:
    """Return what ``FeatureStream`` with the same arguments would do in its first epoch.

    Raises:
        ConfigError: the order is out of range.
    """
    order = order_of(config, shuffle_frames=shuffle_frames)
    index = features.index
    plan = plan_epoch(order, movies, index.rows, epoch=0, shard=index.shard)
    rows_N, real_N = index.rows[plan.movie].astype(np.int64), plan.length
    n_windows = order.n_windows(index.rows[movies])
    parts = world_size * accumulation
    size = slice_size(n_windows, config.global_batch, parts)
    row_bytes = features.dim * 2
    columns = (index.shard, index.offset, index.rows, plan.movie, plan.visit, plan.start)
    return Preview(
        windows=len(plan.movie),
        steps=count_steps(n_windows, config.global_batch, drop_last=config.drop_last),
        global_batch=config.global_batch,
        world_size=world_size,
        accumulation=accumulation,
        batch_size=size,
        padding_share=padding_share(
            n_windows, config.global_batch, parts, drop_last=config.drop_last
        ),
        real_share=float(real_N.mean() / config.frames) if len(real_N) else 0.0,
        requests=plan.steps * parts * size,
        n_bytes=_rows_read(order, plan, rows_N, real_N) * row_bytes,
        buffer_bytes=(config.prefetch + 2) * size * config.frames * row_bytes,
        plan_bytes=sum(column.nbytes for column in columns),
        digest=order.digest(movies),
        first=tuple(
            FirstWindow(features.movie_ids[movie], start, start + real)
            for movie, start, real in zip(
                plan.movie[:N_FIRST].tolist(),
                plan.start[:N_FIRST].tolist(),
                real_N[:N_FIRST].tolist(),
                strict=True,
            )
        ),
    )


def _rows_read(order: Order, plan: WindowPlan, rows_N: IntArray, real_N: IntArray) -> int:
    """Return the rows that an epoch reads; permuted windows read the range that covers theirs."""
    if not order.shuffle_frames:
        return int(real_N.sum())
    total = 0
    for movie, start, n_rows, real in zip(
        plan.movie.tolist(), plan.start.tolist(), rows_N.tolist(), real_N.tolist(), strict=True
    ):
        chosen = frame_order(order.seed, movie, n_rows)[start : start + real]
        total += int(np.ptp(chosen)) + 1
    return total
