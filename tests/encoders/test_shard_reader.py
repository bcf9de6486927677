"""Both readers give the same bytes, from a disk and from a server that fails."""

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

Watch = Callable[..., bool]


def encode(config: Config, location: str, timeout: float, watch: Watch) -> None:
    """Encode the frames at a URL; the features are published where the config says."""
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


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["index", "webdataset"])
def test_a_server_that_stalls_and_answers_500_is_survived(
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
                rule(url, *faults)  # again, in the midst of it
            done.append(1)
            return True

        rule(url, *faults)
        encode(other, location, 120, watch)
        assert len(log(url)) > 8, "the second faults met somebody"
    assert features(other) == features(config)


def test_a_server_that_stays_dead_ends_in_one_clear_line(
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


def test_both_readers_give_the_same_bytes(config: Config) -> None:
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


def test_the_reference_reader_gives_the_features_of_the_index(
    config: Config, configure: Configure
) -> None:
    other = configure("encoder.reader=webdataset", "encoder.name=other")
    first, second = run_task(config).manifest, run_task(other).manifest
    assert first is not None
    assert second is not None
    assert first.digest == second.digest


def test_the_reference_reader_refuses_a_tar_that_is_not_what_its_index_says(
    config: Config,
) -> None:
    frames = open_frames(config.frames_dir)
    shard = open_shard(frames, 0)
    one, other = (Path(config.frames_dir) / frames.tar_name(number) for number in (0, 1))
    one.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"frame shard 0: got sample .*; verify the set"):
        list(READERS["webdataset"](frames, shard, [range(len(shard.index))], ReadBuffers()))


def test_room_is_used_again_and_grows_with_what_is_read() -> None:
    rooms = ReadBuffers()
    first = rooms.take(10)
    rooms.give_back([first[2:4], first[6:9]])
    assert rooms.take(8).obj is first.obj
    assert rooms.take(8).obj is not first.obj, "the first is in use"
    rooms.give_back([first[2:4]])
    assert len(rooms.take(11)) == 11
