"""Frames are read from the configured location, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.schema import Config
from encoders.__main__ import main
from encoders.task import run_task
from tests.encoders.conftest import Configure, upload
from tests.sharding.servers import faulty_server, free_port

pytestmark = pytest.mark.slow


def test_frames_are_read_from_a_url_and_features_published_in_the_root(
    config: Config, configure: Configure
) -> None:
    first = run_task(config).manifest
    with faulty_server() as url:
        location = upload(config.frames_dir, url)
        second = run_task(
            configure("encoder.name=over-http", f"encoder.frames_url={location}")
        ).manifest
    assert first is not None
    assert second is not None
    assert second.digest == first.digest


def test_an_unreachable_server_is_reported_in_one_line(
    configure: Configure, dump: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure()
    arguments = [
        *("--config", str(dump.parent / "config.yaml")),
        *("storage.timeout=1s", f"encoder.frames_url=http://127.0.0.1:{free_port()}/frames"),
    ]
    assert main(["run", *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "/frames" in lines[-1]
