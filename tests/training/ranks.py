"""Ranks in real processes, forked by a server that has imported torch, so that they start fast.

    python ranks.py

reads one job per line, runs its ranks, and prints a line when they have ended.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Job:
    """Ranks that train without a model: they log each window and save the position at each step."""

    folder: str
    """Folder of logs and position."""

    source: str
    stream: dict[str, Any]
    world: int
    epochs: int
    attempt: int = 0
    storage: dict[str, Any] = field(default_factory=dict)
    lockstep: bool = True
    """Synchronize the ranks at every step, as gradients do."""

    kill: list[Any] | None = None
    """[rank, step of this attempt, ``before`` or ``after`` it is logged, or ``saved``]: the moment
    at which this rank kills itself. The other ranks are killed as well, as on a lost node."""


def consume(job: Job, rank: int, barrier: Any) -> None:
    """Run one rank: the training loop without the model."""
    from configs.errors import MovieNetError
    from configs.runtime.publish import publish_bytes
    from configs.schema import StorageConfig, StreamConfig
    from sharding.features import open_features
    from training.stream.loader import FeatureStream

    folder = Path(job.folder)
    position = folder / "position.json"
    log = os.open(folder / f"{job.attempt}-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        features = open_features(job.source, StorageConfig(**job.storage))
        stream = FeatureStream(
            features,
            np.arange(len(features.index)),
            StreamConfig(**job.stream),
            rank=rank,
            world_size=job.world,
        )
        if position.exists():
            stream.load_state_dict(json.loads(position.read_bytes()))
        steps = 0
        while stream.epoch < job.epochs:
            for batch in stream:
                _die_if_due(job, rank, steps, "before")
                os.write(log, (json.dumps(_describe(batch)) + "\n").encode())
                _die_if_due(job, rank, steps, "after")
                if not job.lockstep:
                    continue
                barrier.wait()  # the gradients' all-reduce
                if rank == 0:
                    publish_bytes(position, json.dumps(stream.state_dict()).encode())
                _die_if_due(job, rank, steps, "saved")
                barrier.wait()
                steps += 1
        while getattr(stream.source, "admitting", False):  # closing would abort it
            time.sleep(0.001)
        stats = stream.stats()
        stream.close()
        (folder / f"{job.attempt}-{rank}.stats").write_text(json.dumps(stats))
    except MovieNetError as error:
        (folder / f"{job.attempt}-{rank}.error").write_text(str(error))
        barrier.abort()
        raise SystemExit(1) from None
    except threading.BrokenBarrierError:
        raise SystemExit(1) from None


def _describe(batch: Any) -> list[Any]:
    windows = [
        [movie, window_index, start, hashlib.sha256(rows.numpy().tobytes()).hexdigest()]
        for movie, window_index, start, rows, weight in zip(
            batch.movie.tolist(),
            batch.window_index.tolist(),
            batch.start.tolist(),
            batch.features,
            batch.weight.tolist(),
            strict=True,
        )
        if weight
    ]
    return [batch.epoch, batch.step, windows]


def _die_if_due(job: Job, rank: int, step: int, when: str) -> None:
    if job.kill == [rank, step, when]:
        os.kill(os.getpid(), signal.SIGKILL)


def serve() -> None:
    """Run the jobs of stdin in sequence."""
    import training.stream.batch
    import training.stream.loader  # noqa: F401  # slow imports, inherited by the forked ranks

    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        job = Job(**json.loads(line))
        barrier = context.Barrier(job.world)
        ranks = [
            context.Process(target=consume, args=(job, k, barrier), daemon=True)
            for k in range(job.world)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks if job.kill is None else [ranks[job.kill[0]]]:
            rank.join(TIMEOUT_S)
        if job.kill is not None:
            for rank in ranks:
                rank.kill()
                rank.join()
        print(json.dumps([rank.exitcode for rank in ranks]), flush=True)


class Ranks:
    """Client of the server."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, job: Job, meanwhile: Callable[[], None] = lambda: None) -> list[int]:
        """Run the ranks and return their exit codes; ``meanwhile`` is called repeatedly."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not selector.select(0.001):
                meanwhile()
        codes: list[int] = json.loads(self._process.stdout.readline())
        return codes


@contextmanager
def rank_server() -> Iterator[Ranks]:
    """Start the server; its ranks end with the block."""
    command = [sys.executable, __file__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield Ranks(process)


def errors(job: Job) -> list[str]:
    """Return the error messages of the ranks."""
    folder = Path(job.folder)
    return [path.read_text() for path in sorted(folder.glob(f"{job.attempt}-*.error"))]


def stats(job: Job) -> list[dict[str, float]]:
    """Return the statistics of each rank."""
    folder = Path(job.folder)
    return [
        json.loads((folder / f"{job.attempt}-{rank}.stats").read_text())
        for rank in range(job.world)
    ]


def batches(folder: Path, *, attempts: int = 1) -> dict[tuple[int, int], list[Any]]:
    """Return the windows of each global batch in order; later attempts replace earlier ones."""
    merged: dict[tuple[int, int], list[Any]] = {}
    for attempt in range(attempts):
        logged: dict[tuple[int, int], list[Any]] = {}
        # A killed rank may end the attempt before another rank has opened its log.
        for log in sorted(folder.glob(f"{attempt}-*.log")):
            for line in log.read_text().splitlines():
                epoch, step, windows = json.loads(line)
                logged.setdefault((epoch, step), []).extend(windows)
        merged |= logged
    return merged


if __name__ == "__main__":
    serve()
