"""The table of a rehearsal, from what was measured, and what the same takes for all of MovieNet."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from slurm.estimate import Estimate, PlanSize
from slurm.resources import clock
from tests.rehearsal.work import restarts

MOVIENET = PlanSize(movies=1100, images=4_798_413, n_bytes=161_000_000_000)
GPUS = (1, 8, 64)
CORES_PER_GPU = 8
GPU_IMAGES_S = 2500.0
"""Assumed rate of ViT-B/32 in bf16 on one GPU."""

DISK_MB_S = 500.0
"""Assumed rate of a shared file system, reading and writing together."""

SHARD_TASKS = 16
"""Assumed tasks of sharding."""

TIME_LIMIT_S = 4 * 3600

Records = Sequence[Sequence[Mapping[str, Any]]]
"""The attempts of each task."""


@dataclass(frozen=True)
class Measured:
    """What a rehearsal measured."""

    films: int
    """Films that were built."""

    films_in_dump: int
    shots: int
    images: int
    """Images in the frame shards."""

    n_bytes: int
    """Bytes of these images."""

    dirt: Mapping[str, int]
    """Number of names of each finding of ``check``."""

    wall_s: Mapping[str, float]
    """Seconds of each step that runs alone."""

    attempts: Mapping[str, Records]
    """Records of ``shard``, ``encode`` and ``train``."""

    decoded_per_s: float
    """Real-sized JPEGs that one core decodes and resizes per second."""

    digest: str
    is_identical: bool
    peaks_mb: Mapping[str, float] = field(default_factory=dict)
    """Peak memory of each process."""


def seconds_of(tasks: Records) -> float:
    """Return the seconds from the start of the first attempt to the end of the last one."""
    starts = [_time(record["started"]) for task in tasks for record in task]
    ends = [_time(record["ended"]) for task in tasks for record in task if record["ended"]]
    return max(1.0, (max(ends) - min(starts)).total_seconds())


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def lines(measured: Measured) -> Iterator[str]:
    """Yield the table."""
    m = measured
    yield (
        f"films {m.films} of {m.films_in_dump}   shots {m.shots:,}   images {m.images:,}   "
        f"bytes {m.n_bytes / 1e9:.2f} GB   {m.n_bytes / m.images:.0f} bytes per image"
    )
    dirt = "   ".join(f"{name} {count}" for name, count in sorted(m.dirt.items()))
    yield from textwrap.wrap(f"dirt  {dirt}", 100, subsequent_indent="      ")
    yield ""
    yield from _rates(m)
    yield ""
    yield "peak memory of a process, MB"
    yield from (f"  {peak:>7,.0f}   {name}" for name, peak in sorted(m.peaks_mb.items()))
    yield ""
    yield from whole(m)
    yield ""
    yield last_line(m)


def _rates(m: Measured) -> Iterator[str]:
    yield f"{'step':<30}{'seconds':>9}{'images/s':>11}{'attempts':>10}{'requeued':>10}{'lost':>6}"
    for name, seconds in m.wall_s.items():
        yield f"{name:<30}{seconds:>9,.0f}{m.images / seconds:>11,.0f}"
    for stage, tasks in m.attempts.items():
        seconds, (requeued, lost) = seconds_of(tasks), restarts(tasks)
        rate = "" if stage == "train" else f"{m.images / seconds:,.0f}"
        counts = f"{sum(map(len, tasks)):>10}{requeued:>10}{lost:>6}"
        yield f"{stage + ', restarts included':<30}{seconds:>9,.0f}{rate:>11}{counts}"


def whole(m: Measured) -> Iterator[str]:
    """Yield what the whole of MovieNet takes on each number of GPUs, and the assumptions."""
    per_gpu = min(GPU_IMAGES_S, CORES_PER_GPU * m.decoded_per_s)
    yield f"{'all of MovieNet, 161 GB':<26}{'shard':>10}{'encode':>10}{'train':>10}{'total':>10}"
    for gpus in GPUS:
        stages = (shard_time(m), encode_time(per_gpu, gpus).seconds, train_time(m))
        row = "".join(f"{clock(round(seconds)):>10}" for seconds in (*stages, sum(stages)))
        yield f"{gpus:>3} GPU{'s' if gpus > 1 else ' '}{'':<18}{row}"
    yield (
        f"  measured: one core decodes {m.decoded_per_s:,.0f} images of 426 x 240 per second; "
        f"a shard task packs"
    )
    yield (
        f"    {m.images / m.wall_s['shard, undisturbed']:,.0f} images/s; training took "
        f"{seconds_of(m.attempts['train']):,.0f} s"
    )
    yield (
        f"  assumed: {CORES_PER_GPU} cores and {GPU_IMAGES_S:,.0f} images/s per GPU; {SHARD_TASKS} "
        f"shard tasks, but {DISK_MB_S:,.0f} MB/s of disk at most;"
    )
    yield "    training on one device, in proportion to the movies; no wait in the queue"


def shard_time(m: Measured) -> float:
    """Return the seconds of sharding: by the images of all tasks, or by the disk."""
    per_task = m.images / m.wall_s["shard, undisturbed"]
    by_images = (MOVIENET.images or 0) / (per_task * SHARD_TASKS)
    return max(by_images, MOVIENET.n_bytes / 1e6 / DISK_MB_S)


def encode_time(per_gpu: float, gpus: int) -> Estimate:
    """Return the estimate of encoding, one task per GPU."""
    return Estimate("encode", float(MOVIENET.images or 0), per_gpu, gpus, TIME_LIMIT_S)


def train_time(m: Measured) -> float:
    """Return the seconds of training, in proportion to the movies."""
    return seconds_of(m.attempts["train"]) * MOVIENET.movies / m.films


def last_line(m: Measured) -> str:
    """Return the line that a rehearsal is about."""
    counts = [restarts(tasks) for tasks in m.attempts.values()]
    requeues, lost = (sum(count) for count in zip(*counts, strict=True))
    verdict = "yes" if m.is_identical else "NO"
    return (
        f"features {m.digest[:12]} · {requeues} requeues · {lost} lost workers · "
        f"identical to undisturbed: {verdict}"
    )
