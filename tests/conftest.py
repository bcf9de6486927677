"""What several rooms' tests need."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from configs.runtime.logs import PACKAGES

# A deadline measures the machine, not the code: other work runs beside the tests.
# HYPOTHESIS_EXAMPLES=2000 looks longer than a change need wait for.
settings.register_profile(
    "house", deadline=None, max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "100"))
)
settings.load_profile("house")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _forget_logging() -> Iterator[None]:
    """Undo what a command under test set up: its stderr is gone, and the next test listens."""
    yield
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _forget_environment() -> Iterator[None]:
    """Undo what a command under test set for its process, such as keeping off the hub."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _node_disk(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let each test cache remote shards in a folder of its own, not in the machine's."""
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path_factory.mktemp("node")))


@pytest.fixture(scope="session")
def real_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 878 real films as published: ``ProcessedTensor/``, pickles, split, ``meta/``."""
    unpack = SHARED / "movienet-clip-features" / "unpack.py"
    if not unpack.is_file():
        pytest.skip("the real features do not lie beside this checkout")
    out = tmp_path_factory.mktemp("real")
    subprocess.run([sys.executable, str(unpack), str(out), "--meta"], check=True)
    return out


@pytest.fixture
def aws_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A login that the S3 emulator takes, and nothing of the developer's own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
