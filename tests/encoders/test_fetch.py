"""``fetch`` from a hub server, and jobs that never contact it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.schema import Config
from tests.encoders.hub_server import CONTENT, PATH
from tests.sharding.servers import free_port, request, serving

REPOSITORY = Path(__file__).parents[2]

Configure = Callable[..., Config]


@pytest.fixture
def hub() -> Iterator[str]:
    script = Path(__file__).with_name("hub_server.py")
    with serving(lambda port: [sys.executable, str(script), str(port)]) as url:
        yield url


def encoders(folder: Path, hub: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command against a hub, with a separate cache."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub,
        "HF_HOME": str(folder / "hub-cache"),
        "HF_HUB_ETAG_TIMEOUT": "60",  # a busy machine is not a dead hub
        "HF_HUB_DOWNLOAD_TIMEOUT": "60",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-m", "encoders", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300
    )


def of_clip(folder: Path) -> list[str]:
    return [
        *("--config", str(folder / "config.yaml")),
        *("encoder.model=ViT-B-32-quickgelu", "encoder.pretrained=openai"),
        f"encoder.weights_dir={folder / 'weights'}",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("config")
def test_weights_are_fetched_once_and_jobs_send_no_request(tmp_path: Path, hub: str) -> None:
    missing = encoders(tmp_path, hub, "run", *of_clip(tmp_path))
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].endswith("on a node with internet")
    assert json.loads(request(f"{hub}/_log")) == [], "a job sent a request"

    fetched = encoders(tmp_path, hub, "fetch", *of_clip(tmp_path))
    assert fetched.returncode == 0, fetched.stderr
    assert PATH in json.loads(request(f"{hub}/_log"))
    stored = tmp_path / "weights" / "ViT-B-32-quickgelu.openai.safetensors"
    assert stored.read_bytes() == CONTENT
    record = json.loads(stored.with_suffix(".json").read_bytes())
    assert record["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert record["preprocessing"]["resize_mode"] == "shortest"

    n_requests = len(json.loads(request(f"{hub}/_log")))
    planned = encoders(tmp_path, hub, "plan", *of_clip(tmp_path))
    assert planned.returncode == 1
    assert "not weights of ViT-B-32-quickgelu" in planned.stderr, "the fetched file was read"
    assert len(json.loads(request(f"{hub}/_log"))) == n_requests

    listed = encoders(tmp_path, hub, "models", "B-32-quick", "--weights-dir", "weights")
    assert listed.stdout.splitlines()[1].split()[:4] == [
        *("ViT-B-32-quickgelu", "512", "224"),
        "openai*",
    ]


@pytest.mark.slow
def test_an_unreachable_hub_is_reported_in_one_line(configure: Configure, tmp_path: Path) -> None:
    configure()
    dead = f"http://127.0.0.1:{free_port()}"
    done = encoders(tmp_path, dead, "fetch", *of_clip(tmp_path))
    assert done.returncode == 1
    announcement, progress, error = done.stderr.splitlines()
    assert announcement.endswith("fetching encoder ViT-B-32-quickgelu, weights openai")
    assert progress.endswith("importing OpenCLIP")
    assert error.startswith("error: fetch ViT-B-32-quickgelu 'openai': ")
    assert "Connection refused" in error, "the actual reason, not the client's guess"
