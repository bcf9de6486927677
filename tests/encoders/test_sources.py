"""Frames read over HTTP from a server that fails: the same features, or one clear line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.errors import MachineError
from configs.schema import Config, StorageConfig
from encoders.__main__ import main
from encoders.extract import Extractor
from encoders.run import open_stage, run_task
from sharding.frames import open_frames
from sharding.storage.local import DiskStorage
from tests.sharding import faulty_server as script
from tests.sharding.servers import faulty_server, free_port, log, request, rule, started

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


def test_frames_are_read_from_a_url_and_features_published_in_the_root(
    config: Config, configure: Configure
) -> None:
    first = run_task(config).manifest
    with faulty_server() as url:
        location = upload(config.frames_dir, url)
        second = run_task(
            configure("encoder.name=over-http", f"encoder.source={location}")
        ).manifest
    assert first is not None
    assert second is not None
    assert second.digest == first.digest


def test_a_server_that_is_not_there_is_told_by_the_command_in_one_line(
    configure: Configure, dump: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure()
    arguments = [
        *("--config", str(dump.parent / "config.yaml")),
        *("storage.timeout=1s", f"encoder.source=http://127.0.0.1:{free_port()}/frames"),
    ]
    assert main(["run", *arguments]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    assert "/frames" in said[-1]


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
