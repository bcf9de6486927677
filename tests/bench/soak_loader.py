"""The loader over a failing HTTP server for 30 minutes: memory, open files, and every epoch exact.

    python tests/bench/soak_loader.py [--minutes M] [--json FILE] [--scratch FOLDER]

A consumer takes 128 windows per second through a cache that holds a third of the set, so that
shards are downloaded, evicted and read by ranges all the time, while ``faulty_http.py`` fails. Each
value of each window is compared with a formula, and each epoch must have every window once. The
exit status is 0 if that holds, and if memory, open files and threads of the last third of the time
are those of the middle third. ``show_soak.py`` draws the samples.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, installed or not

from faulty_http import RATES, STALL_S

if TYPE_CHECKING:
    from training.stream.batch import Batch
    from training.stream.loader import FeatureStream

MOVIES, PER_SHARD, DIM = 240, 20, 256
WINDOW, WINDOWS_PER_MOVIE, BATCH = 64, 4, 32
BATCHES_PER_S = 4.0
CACHED_SHARDS, BLOCK_SHARDS = 4, 2
DELAY_MS, TIMEOUT_S, SEED = 5, 20.0, 7
SAMPLES = 360
"""Samples of memory and open files during the complete time."""

TOLERANCES = {"memory_mb": 8.0, "files": 2.0, "threads": 4.0}
"""Largest growth of each median from the middle third of the time to the last third. The HTTP
client's own pool of threads grows with the largest number of connections opened at once."""


# --- the data -------------------------------------------------------------------------------------


def n_rows(movie: int) -> int:
    """Return the rows of a movie: 40, less than a window, to 1,232."""
    return 40 + 149 * movie % 1193


def rows_of(movie: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.float16]:
    """Return rows ``[..., DIM]`` of movies: whole numbers that float16 represents exactly."""
    first = (movie * 389 + row * 31)[..., None]
    return ((first + 7 * np.arange(DIM)) % 2048).astype(np.float16)


def make_set(folder: Path) -> None:
    """Write a sealed feature set of the rows of ``rows_of``."""
    from sharding.features import MovieFeatures, publish_feature_shard, seal_features
    from sharding.labels import make_labels
    from sharding.storage.local import DiskStorage

    def movie(number: int) -> MovieFeatures:
        row = np.arange(n_rows(number))
        values = rows_of(np.full(len(row), number), row)
        shots = np.full(len(row), -1, np.int32)
        return MovieFeatures(f"tt{number:07d}", values, shots, len(row))

    storage, content = DiskStorage(folder), map(movie, range(MOVIES))
    for shard in range(MOVIES // PER_SHARD):
        publish_feature_shard(
            storage, shard, itertools.islice(content, PER_SHARD), input_digest="soak"
        )
    seal_features(
        storage,
        n_shards=MOVIES // PER_SHARD,
        provenance={"import": {"from": "soak"}, "dim": DIM},
        labels_for=lambda ids: make_labels(
            ids, ("Drama", "Comedy"), {key: ["Drama"] for key in ids}, dict.fromkeys(ids, "train")
        )[0],
    )


@contextmanager
def faulty_server(folder: Path) -> Iterator[str]:
    """Serve a folder from another process; yield the URL."""
    script = Path(__file__).with_name("faulty_http.py")
    command = [sys.executable, str(script), str(folder), str(DELAY_MS), str(SEED)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        assert server.stdin is not None
        server.stdin.close()


def read_counts(url: str) -> dict[str, int]:
    """Return how many requests the server answered, and how many times it failed in each way."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("GET", "/_faults")
    counts: dict[str, int] = json.load(connection.getresponse())
    connection.close()
    return counts


# --- the checks -----------------------------------------------------------------------------------


class Epoch:
    """The windows of an epoch, counted as they arrive."""

    def __init__(self) -> None:
        self._times = np.zeros(MOVIES * WINDOWS_PER_MOVIE, np.int64)

    def add(self, batch: Batch) -> None:
        """Count the windows of a batch; raise ``ValueError`` at a wrong value."""
        movie, start, index, weight = (
            getattr(batch, name).numpy() for name in ("movie", "start", "window_index", "weight")
        )
        expected = rows_of(movie[:, None], start[:, None] + np.arange(WINDOW))
        expected[~batch.mask.numpy()] = 0
        if not np.array_equal(batch.features.numpy(), expected):
            raise ValueError(f"epoch {batch.epoch} step {batch.step}: wrong rows in a window")
        np.add.at(self._times, (movie * WINDOWS_PER_MOVIE + index)[weight > 0], 1)

    @property
    def is_exact(self) -> bool:
        """Return whether every window occurred exactly once."""
        return bool((self._times == 1).all())


def growth(values: Sequence[float]) -> float:
    """Return by how much the median of the last third exceeds that of the middle third."""
    third = len(values) // 3
    return statistics.median(values[-third:]) - statistics.median(values[third : 2 * third])


def flaws(report: Mapping[str, Any]) -> list[str]:
    """Return one line per requirement that a soak does not meet."""
    lines = [
        f"{name}: grew by {growth([sample[name] for sample in report['samples']]):.1f}, "
        f"want at most {limit:g}"
        for name, limit in TOLERANCES.items()
        if growth([sample[name] for sample in report["samples"]]) > limit
    ]
    if report["exact_epochs"] != report["epochs"]:
        lines.append(f"epochs: got {report['exact_epochs']} exact of {report['epochs']}")
    if not all(report["faults"].values()):
        lines.append(f"faults: got {report['faults']}, want some of each kind")
    return lines


# --- the run --------------------------------------------------------------------------------------


def sample(begin: float) -> dict[str, float]:
    """Return memory (MB, of this process alone), open files, threads and seconds since ``begin``.

    Anonymous memory is counted: pages of mapped files belong to the page cache.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "memory_mb": round(int(status["RssAnon"].split()[0]) / 1024, 1),
        "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208  # a count, without objects
        "threads": int(status["Threads"]),
    }


def sample_until(end: threading.Event, every_s: float, samples: list[dict[str, float]]) -> None:
    """Append samples until ``end`` is set."""
    begin = time.monotonic()
    while not end.wait(every_s):
        samples.append(sample(begin))


def consume(stream: FeatureStream, seconds: float) -> tuple[int, int]:
    """Iterate complete epochs for some seconds; return how many, and how many were exact."""
    end, due, epochs, exact = time.monotonic() + seconds, time.monotonic(), 0, 0
    while time.monotonic() < end:
        epoch = Epoch()
        for batch in stream:
            epoch.add(batch)
            due = max(due + 1 / BATCHES_PER_S, time.monotonic() - 1)
            time.sleep(max(0.0, due - time.monotonic()))
        epochs, exact = epochs + 1, exact + epoch.is_exact
    return epochs, exact


def soak(scratch: Path, seconds: float) -> dict[str, Any]:
    """Run the soak; return its report."""
    from configs.schema import StorageConfig, StreamConfig
    from sharding.features import open_features
    from training.stream.loader import FeatureStream

    make_set(scratch / "set")
    shard_bytes = (scratch / "set" / "features-00000.tar").stat().st_size
    config = StreamConfig(
        window=WINDOW,
        windows_per_movie=WINDOWS_PER_MOVIE,
        global_batch=BATCH,
        shuffle_block_shards=BLOCK_SHARDS,
        cache_dir=str(scratch / "cache"),
        cache_bytes=CACHED_SHARDS * shard_bytes,
    )
    samples: list[dict[str, float]] = []
    ended, begin = threading.Event(), time.monotonic()
    sampler = threading.Thread(target=sample_until, args=(ended, seconds / SAMPLES, samples))
    with faulty_server(scratch / "set") as url:
        features = open_features(url, StorageConfig(timeout=TIMEOUT_S))
        movies = features.labels.movies("train")
        with FeatureStream(features, movies, config) as stream:
            sampler.start()
            try:
                epochs, exact = consume(stream, seconds)
            finally:
                ended.set()
                sampler.join()
            stats = stream.stats()
        faults = read_counts(url)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": round(time.monotonic() - begin),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "epochs": epochs,
        "exact_epochs": exact,
        "stats": stats,
        "requests": faults.pop("requests"),
        "faults": faults,
        "rates": RATES,
        "stall_s": STALL_S,
        "samples": samples,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
    }


def main() -> int:
    """Run the soak; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--json", type=Path, help="file for the samples and figures")
    parser.add_argument("--scratch", type=Path, help="folder for 90 MB of temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        report = soak(Path(scratch), 60 * args.minutes)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report))
    for name in ("seconds", "cpu_s", "epochs", "exact_epochs", "requests", "faults", "stats"):
        sys.stdout.write(f"{name}: {report[name]}\n")
    for name in TOLERANCES:
        values = [each[name] for each in report["samples"]]
        sys.stdout.write(f"{name}: peak {max(values):g}, grew by {growth(values):+.1f}\n")
    sys.stdout.write("".join(f"not met: {line}\n" for line in flaws(report)))
    return 1 if flaws(report) else 0


if __name__ == "__main__":
    sys.exit(main())
