"""Both readers return the same bytes, from a disk and from a server with faults."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.errors import DataError, MachineError
from configs.schema import Config, StorageConfig
from encoders.batching import plan_batches
from encoders.extract import Extractor
from encoders.shard_reader import READERS, ReadBuffers, open_shard
from encoders.task import open_stage, run_task
from sharding.frames import open_frames
from tests.encoders.conftest import Configure, upload
from tests.sharding import faulty_server as script
from tests.sharding.servers import faulty_server, log, rule, started

pytestmark = pytest.mark.slow

Watch = Callable[..., bool]


def encode(config: Config, location: str, timeout: float, watch: Watch) -> None:
    """Encode the frames at a URL, and publish the features in the root of the config."""
    stage = open_stage(config, torch.device("cpu"))
    frames = open_frames(location, StorageConfig(timeout=timeout))
    extractor = Extractor(
        config.encoder,
        stage.plan,
        stage.tower,
        stage.device,
        frames=frames,
        features=stage.features,
    )
    extractor.run(range(frames.n_shards), watch)


def features(config: Config) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(config.features_dir).glob("*.tar"))]


@pytest.mark.parametrize("reader", ["index", "webdataset"])
def test_stalls_and_errors_500_of_a_server_are_retried(
    config: Config, configure: Configure, reader: str
) -> None:
    run_task(config)
    other = configure("encoder.name=over-http", f"encoder.reader={reader}")
    with faulty_server() as url:
        location = upload(config.frames_dir, url)
        faults = [
            {"do": "refuse", "status": 500, "code": "InternalError", "times": 4},
            {"do": "stall", "seconds": 1, "times": 2},
            {"do": "cut", "times": 2},
        ]
        done: list[int] = []

        def watch(*_: object) -> bool:
            if not done:
                rule(url, *faults)  # a second time, in the middle of the set
            done.append(1)
            return True

        rule(url, *faults)
        encode(other, location, 120, watch)
        assert len(log(url)) > 8, "the second faults hit a request"
    assert features(other) == features(config)


def test_a_server_that_stays_dead_is_reported_in_one_line(
    config: Config, configure: Configure
) -> None:
    other = configure("encoder.name=over-http", "encoder.batch_size=4")
    process, port = started(lambda port: [sys.executable, script.__file__, str(port)])
    with process:
        location = upload(config.frames_dir, f"http://127.0.0.1:{port}")

        def watch(*_: object) -> bool:
            process.kill()
            return True

        with pytest.raises(MachineError) as caught:
            encode(other, location, 3, watch)
    line = str(caught.value)
    assert location in line
    assert "\n" not in line
    assert len(features(other)) < 5


def test_both_readers_return_the_same_bytes(config: Config) -> None:
    frames = open_frames(config.frames_dir)
    for number in range(frames.n_shards):
        shard = open_shard(frames, number)
        batches = plan_batches(len(shard.index), 4)
        by_index, by_webdataset = (
            [
                [bytes(data) for data in batch]
                for batch in read(frames, shard, batches, ReadBuffers())
            ]
            for read in (READERS["index"], READERS["webdataset"])
        )
        assert by_index == by_webdataset
        assert all(data[:2] == b"\xff\xd8" for batch in by_index for data in batch)


def test_both_readers_give_the_same_features(config: Config, configure: Configure) -> None:
    other = configure("encoder.reader=webdataset", "encoder.name=other")
    first, second = run_task(config).manifest, run_task(other).manifest
    assert first is not None
    assert second is not None
    assert first.digest == second.digest


def test_the_reference_reader_refuses_a_tar_that_does_not_match_its_index(
    config: Config,
) -> None:
    frames = open_frames(config.frames_dir)
    shard = open_shard(frames, 0)
    one, other = (Path(config.frames_dir) / frames.tar_name(number) for number in (0, 1))
    one.write_bytes(other.read_bytes())
    with pytest.raises(
        DataError, match=r"frame shard 0: got sample .*; run `movienet-shard verify"
    ):
        list(READERS["webdataset"](frames, shard, [range(len(shard.index))], ReadBuffers()))


def test_read_buffers_are_reused_and_grow() -> None:
    buffers = ReadBuffers()
    first = buffers.take(10)
    buffers.give_back([first[2:4], first[6:9]])
    assert buffers.take(8).obj is first.obj
    assert buffers.take(8).obj is not first.obj, "the first is in use"
    buffers.give_back([first[2:4]])
    assert len(buffers.take(11)) == 11
