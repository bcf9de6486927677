"""Real servers behind a faulty proxy: no wrong byte reaches a batch, and no rank hangs."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from configs.schema import StorageConfig
from sharding.storage.local import DiskStorage
from sharding.storage.open import open_storage
from tests.sharding.servers import (
    faulty_server,
    log,
    nginx,
    request,
    rule,
    s3_server,
)
from tests.training.ranks import TIMEOUT_S, Job, batches, errors, rank_server

N_ROWS = [40 + 7 * (movie % 23) for movie in range(84)]
WINDOW, BATCH, EPOCHS = 16, 6, 2
STREAM = {"window": WINDOW, "global_batch": BATCH, "prefetch": 2, "threads": 2, "seed": 3}
STORAGE = {"timeout": 20.0, "region": "us-east-1"}
FAULTS: list[dict[str, Any]] = [
    *({"do": kind} for kind in ("cut", "long", "short", "ignore range", "wrong range")),
    {"do": "refuse", "status": 500, "code": "InternalError"},
    {"do": "refuse", "status": 503, "code": "SlowDown"},
]

pytestmark = pytest.mark.usefixtures("aws_login")


@contextmanager
def http_set(folder: Path, tmp_path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Serve a set by nginx behind the proxy; yield (proxy, location, storage section)."""
    with nginx(tmp_path / "nginx", folder) as upstream, faulty_server(upstream) as proxy:
        yield proxy, proxy, STORAGE


@contextmanager
def s3_set(folder: Path, _: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Serve a set by moto's S3 behind the proxy; yield (proxy, location, storage section)."""
    with s3_server() as upstream, faulty_server(upstream) as proxy:
        request(f"{upstream}/bucket", "PUT")
        disk = DiskStorage(folder)
        store = open_storage("s3://bucket/set", StorageConfig(endpoint_url=upstream, **STORAGE))
        for name in disk.names():
            store.publish(name, disk.read(name))
        yield proxy, "s3://bucket/set", STORAGE | {"endpoint_url": proxy}


def check(films: Any, steps: dict[tuple[int, int], list[Any]]) -> None:
    """Assert that each epoch has every window once, with the published bytes."""
    for epoch in range(EPOCHS):
        windows = [each for (of, _), batch in steps.items() if of == epoch for each in batch]
        assert sorted(window[0] for window in windows) == list(range(len(N_ROWS)))
        for movie, _, start, digest in windows:
            rows = films.window(movie, start, WINDOW).tobytes()
            assert digest == hashlib.sha256(rows).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("served", [http_set, s3_set])
def test_no_wrong_byte_reaches_a_batch_of_two_ranks(
    make_films: Callable[..., Any], tmp_path: Path, served: Any, *, cached: bool
) -> None:
    films, generator = make_films(N_ROWS, folder=tmp_path / "set"), random.Random(5)
    (tmp_path / "run").mkdir()
    # Faults of shards only: a faulty manifest or index would end the run with one line.
    rules: list[dict[str, Any]] = []
    for fault in [*FAULTS, *FAULTS, {"do": "stall", "seconds": 8}]:
        shards = {"path": ".tar", "method": "GET"}
        rules += [{"do": "pass", "times": generator.randrange(2, 6)} | shards, fault | shards]
    stream = STREAM | {"cache_dir": str(tmp_path / "cache") if cached else "off"}
    with served(tmp_path / "set", tmp_path) as (proxy, location, storage), rank_server() as ranks:
        rule(proxy, *rules)
        job = Job(str(tmp_path / "run"), location, stream, 2, EPOCHS, storage=storage)
        assert ranks.run(job) == [0, 0], errors(job)
        n_requests = len([each for each in log(proxy) if ".tar" in each["path"]])
    check(films, batches(tmp_path / "run"))
    assert n_requests > len(FAULTS) * 2
    for entry in (tmp_path / "cache").glob("*.tar"):
        assert hashlib.sha256(entry.read_bytes()).hexdigest() == entry.stem


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dead", "cached"), [("silent", False), ("silent", True), ("busy", False), ("changed", False)]
)
def test_an_unavailable_source_ends_every_rank_with_one_line(
    make_films: Callable[..., Any], tmp_path: Path, dead: str, *, cached: bool
) -> None:
    make_films(N_ROWS, folder=tmp_path / "set")
    (tmp_path / "run").mkdir()
    faults: dict[str, dict[str, Any]] = {
        "silent": {"do": "stall", "seconds": 60},
        "busy": {"do": "refuse", "status": 503, "code": "SlowDown"},
        "changed": {"do": "other version"},
    }
    line = {
        "silent": "gave up after ",
        "busy": "gave up after ",
        "changed": "changed while it was read",
    }[dead]
    # Space for one of twelve shards: a complete cache would hide the failure of the source.
    cache = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 30_000}
    stream = STREAM | (cache if cached else {"cache_dir": "off"})
    served = http_set(tmp_path / "set", tmp_path)
    with served as (proxy, location, storage), rank_server() as ranks:
        job = Job(str(tmp_path / "run"), location, stream, 2, 1000, lockstep=False)
        job.storage.update(storage | {"timeout": 4.0})
        failed_at: list[float] = []

        def fail() -> None:
            logs = list((tmp_path / "run").glob("*.log"))
            steps = [log.read_bytes().count(b"\n") for log in logs]
            if not failed_at and len(steps) == 2 and min(steps) > 10:  # both have read most shards
                failed_at.append(time.monotonic())
                rule(proxy, faults[dead] | {"times": 10**9})

        codes = ranks.run(job, fail)
        seconds = time.monotonic() - failed_at[0]
    assert codes == [1, 1]
    assert seconds < TIMEOUT_S / 5  # the time limit is 4 s, and the machine may be busy
    lines = errors(job)
    assert len(lines) == 2
    for message in lines:
        assert line in message
        assert "\n" not in message
        assert location in message
