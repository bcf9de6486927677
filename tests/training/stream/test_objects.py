"""The stream over an object store: the same batches as from a folder, despite network faults."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import MachineError
from configs.runtime.publish import TEMPORARY_PREFIX
from configs.schema import StorageConfig, StreamConfig
from sharding.features import FeatureSet, open_features
from sharding.storage.base import Range
from sharding.storage.local import DiskStorage
from sharding.storage.open import open_storage
from tests.sharding.servers import faulty_server, log, request, rule, s3_server
from training.stream.loader import FeatureStream

N_ROWS = [3 + 7 * (movie % 5) for movie in range(40)]
CONFIG = StreamConfig(window=16, global_batch=8, threads=3, prefetch=2, cache_dir="off")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("aws_login")]


@pytest.fixture(scope="module")
def faulty() -> Iterator[str]:
    with faulty_server() as url:
        yield url


def config_for(url: str) -> StorageConfig:
    return StorageConfig(endpoint_url=url, region="us-east-1", timeout=20)


def upload(folder: Path, location: str, config: StorageConfig) -> FeatureSet:
    """Copy a set from a folder to a store, and open the copy."""
    disk, store = DiskStorage(folder), open_storage(location, config)
    for name in disk.names():
        store.publish(name, disk.read(name), replace=True)
    return open_features(location, config)


def batches(features: FeatureSet, **options: Any) -> list[Any]:
    stream = FeatureStream(features, np.arange(len(N_ROWS)), CONFIG, **options)
    with stream:
        return [batch.features.numpy().copy() for batch in stream]


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_batches_equal_those_of_a_folder(
    make_films: Callable[..., Any], tmp_path: Path, shuffle: bool
) -> None:
    films = make_films(N_ROWS, folder=tmp_path / "set")
    with s3_server() as url:
        bucket = f"bucket-{random.SystemRandom().getrandbits(40)}"
        request(f"{url}/{bucket}", "PUT")
        remote = upload(tmp_path / "set", f"s3://{bucket}/films/features/x", config_for(url))
        assert remote.digest == films.features.digest
        expected = batches(films.features, shuffle_frames=shuffle)
        received = batches(remote, shuffle_frames=shuffle)
    assert len(received) == 5
    for got, want in zip(received, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_batches_are_the_same_when_requests_fail_occasionally(
    make_films: Callable[..., Any], tmp_path: Path, faulty: str
) -> None:
    films = make_films(N_ROWS, folder=tmp_path / "set")
    rule(faulty)
    remote = upload(tmp_path / "set", "s3://bucket/x", config_for(faulty))
    kinds = ["cut", "long", "short", "ignore range", "wrong range", "other version"]
    faults: list[dict[str, Any]] = [{"do": kind} for kind in kinds]
    faults += [{"do": "refuse", "status": 503, "code": "SlowDown", "times": 3}]
    for shard in remote.manifest.shards:  # pins the version of each shard
        remote.storage.read_into([Range(shard.name, 0)], [memoryview(bytearray(1))])
    rule(faulty, *faults)
    before = remote.storage.counts()
    received = batches(remote)
    counts = {name: value - before[name] for name, value in remote.storage.counts().items()}
    assert counts == {"requests": len(log(faulty)), "retries": 9}
    assert counts["requests"] - 9 < len(N_ROWS)  # small neighbouring ranges were read together
    for got, want in zip(received, batches(films.features), strict=True):
        np.testing.assert_array_equal(got, want)


def test_an_unreachable_store_ends_the_stream_with_one_line(
    make_films: Callable[..., Any], tmp_path: Path
) -> None:
    make_films(N_ROWS, folder=tmp_path / "set")
    with faulty_server() as url:
        remote = upload(tmp_path / "set", "s3://bucket/x", config_for(url))
    impatient = config_for(url).model_copy(update={"timeout": 1.0})
    remote = replace(remote, storage=open_storage("s3://bucket/x", impatient))
    with pytest.raises(MachineError, match=r"gave up after \d+ tries in 1 s .* refused; check"):
        batches(remote)


@pytest.mark.parametrize("cached", [False, True])
def test_closing_does_not_wait_for_an_unresponsive_server(
    make_films: Callable[..., Any], tmp_path: Path, faulty: str, *, cached: bool
) -> None:
    make_films(N_ROWS, folder=tmp_path / "set")
    rule(faulty)
    patient = config_for(faulty).model_copy(update={"timeout": 400.0})
    remote = upload(tmp_path / "set", "s3://bucket/x", patient)
    # Space for one shard: the others are read by ranges.
    cache = (
        {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 20_000}
        if cached
        else {"cache_dir": "off"}
    )
    config = CONFIG.model_copy(update=cache | {"prefetch": 1})
    with FeatureStream(remote, np.arange(len(N_ROWS)), config) as stream:
        batches = iter(stream)
        next(batches)
        wait_until(lambda: is_quiet(faulty))  # the second batch has been read
        rule(faulty, {"do": "stall", "seconds": 400, "times": 10**9, "path": ".tar"})
        next(batches)
        wait_until(lambda: bool(log(faulty)))  # the third batch is blocked
        begin = time.monotonic()
    assert time.monotonic() - begin < 60  # two waits of PATIENCE_S take 2 s, one read 100 s
    rule(faulty)
    wait_until(lambda: not reading_threads())  # they end on their own
    if cached:
        assert not list((tmp_path / "cache").glob(f"{TEMPORARY_PREFIX}*"))


def is_quiet(url: str) -> bool:
    n_requests = len(log(url))
    time.sleep(0.5)
    return len(log(url)) == n_requests


def reading_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("stream-")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _first_batch(features: FeatureSet, messages: multiprocessing.SimpleQueue[str]) -> None:
    try:
        batches(features)
        messages.put("batches")
    except MachineError as error:
        messages.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_stream_created_in_a_forked_child_is_refused_in_one_line(
    make_films: Callable[..., Any], tmp_path: Path, faulty: str
) -> None:
    make_films(N_ROWS, folder=tmp_path / "set")
    remote = upload(tmp_path / "set", "s3://bucket/x", config_for(faulty))
    context = multiprocessing.get_context("fork")
    messages: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    child = context.Process(target=_first_batch, args=(remote, messages))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert "connections do not survive a fork; start workers by spawn" in messages.get()
