"""Real servers behind a proxy that breaks things: no wrong byte reaches a batch, nobody hangs."""

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
from tests.training.ranks import TIMEOUT_S, Job, batches, rank_server, told

N_ROWS = [40 + 7 * (movie % 23) for movie in range(84)]
FRAMES, BATCH, EPOCHS = 16, 6, 2
STREAM = {"window": FRAMES, "global_batch": BATCH, "prefetch": 2, "threads": 2, "seed": 3}
STORAGE = {"timeout": 20.0, "region": "us-east-1"}
FAULTS: list[dict[str, Any]] = [
    *({"do": kind} for kind in ("cut", "long", "short", "ignore range", "wrong range")),
    {"do": "refuse", "status": 500, "code": "InternalError"},
    {"do": "refuse", "status": 503, "code": "SlowDown"},
]

pytestmark = pytest.mark.usefixtures("aws_login")


@contextmanager
def http_set(folder: Path, tmp_path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Serve a set by nginx behind the proxy; give (proxy, location, storage section)."""
    with nginx(tmp_path / "nginx", folder) as upstream, faulty_server(upstream) as proxy:
        yield proxy, proxy, STORAGE


@contextmanager
def s3_set(folder: Path, _: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The same by moto's S3."""
    with s3_server() as upstream, faulty_server(upstream) as proxy:
        request(f"{upstream}/bucket", "PUT")
        from_ = DiskStorage(folder)
        to = open_storage("s3://bucket/set", StorageConfig(endpoint_url=upstream, **STORAGE))
        for name in from_.names():
            to.publish(name, from_.read(name))
        yield proxy, "s3://bucket/set", STORAGE | {"endpoint_url": proxy}


def check(films: Any, found: dict[tuple[int, int], list[Any]]) -> None:
    """Every window once an epoch, and every byte as it was published."""
    for epoch in range(EPOCHS):
        windows = [each for (of, _), some in found.items() if of == epoch for each in some]
        assert sorted(window[0] for window in windows) == list(range(len(N_ROWS)))
        for movie, _, start, digest in windows:
            rows = films.window(movie, start, FRAMES).tobytes()
            assert digest == hashlib.sha256(rows).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("served", [http_set, s3_set])
def test_no_wrong_byte_reaches_a_batch_of_two_ranks(
    make_films: Callable[..., Any], tmp_path: Path, served: Any, *, cached: bool
) -> None:
    films, draw = make_films(N_ROWS, folder=tmp_path / "set"), random.Random(5)
    (tmp_path / "run").mkdir()
    # A fault now and then, of shards alone: a manifest or index that came wrong ends in one line.
    rules: list[dict[str, Any]] = []
    for fault in [*FAULTS, *FAULTS, {"do": "stall", "seconds": 8}]:
        some = {"path": ".tar", "method": "GET"}
        rules += [{"do": "pass", "times": draw.randrange(2, 6)} | some, fault | some]
    stream = STREAM | {"cache": str(tmp_path / "cache") if cached else "off"}
    with served(tmp_path / "set", tmp_path) as (proxy, location, storage), rank_server() as ranks:
        rule(proxy, *rules)
        job = Job(str(tmp_path / "run"), location, stream, 2, EPOCHS, storage=storage)
        assert ranks.run(job) == [0, 0], told(job)
        asked = len([each for each in log(proxy) if ".tar" in each["path"]])
    check(films, batches(tmp_path / "run"))
    assert asked > len(FAULTS) * 2
    for entry in (tmp_path / "cache").glob("*.tar"):
        assert hashlib.sha256(entry.read_bytes()).hexdigest() == entry.stem


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dead", "cached"), [("silent", False), ("silent", True), ("busy", False), ("changed", False)]
)
def test_a_source_that_stays_dead_ends_in_one_line_on_every_rank(
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
    # Room for a shard of twelve: with all of them at hand nobody would miss the source.
    cache = {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 30_000}
    stream = STREAM | (cache if cached else {"cache": "off"})
    served = http_set(tmp_path / "set", tmp_path)
    with served as (proxy, location, storage), rank_server() as ranks:
        job = Job(str(tmp_path / "run"), location, stream, 2, 1000, lockstep=False)
        job.storage.update(storage | {"timeout": 4.0})
        began: list[float] = []

        def dies() -> None:
            logs = list((tmp_path / "run").glob("*.log"))
            steps = [log.read_bytes().count(b"\n") for log in logs]
            if not began and len(steps) == 2 and min(steps) > 10:  # both have seen most shards
                began.append(time.monotonic())
                rule(proxy, faults[dead] | {"times": 10**9})

        codes = ranks.run(job, dies)
        took = time.monotonic() - began[0]
    assert codes == [1, 1]
    assert took < TIMEOUT_S / 5  # 4 s and a busy machine
    lines = told(job)
    assert len(lines) == 2
    for said in lines:
        assert line in said
        assert "\n" not in said
        assert location in said
