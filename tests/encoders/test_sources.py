"""Frames read over HTTP from a server that fails: the same features, or one clear line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.errors import MachineError
from configs.schema import Config, StorageConfig
from encoders.extract import Extractor
from encoders.run import open_stage, run_task
from sharding.frames import open_frames
from sharding.storage import DiskStorage
from tests.sharding import faulty_server as script
from tests.sharding.servers import faulty_server, log, request, rule, started

Configure = Callable[..., Config]
Watch = Callable[..., bool]


def upload(frames_dir: str, url: str) -> str:
    """Put a frame set on a server; return where it lies."""
    from_ = DiskStorage(Path(frames_dir))
    for name in from_.names():
        request(f"{url}/bucket/frames/{name}", "PUT", from_.read(name))
    return f"{url}/bucket/frames"


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
