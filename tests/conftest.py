"""Fixtures and settings of all tests."""

from __future__ import annotations

import gc
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from configs.runtime.hints import remember_arguments
from configs.runtime.logs import PACKAGES
from tests.made_once import made_once

# A deadline, or a check of how fast inputs are generated, would measure the machine, which other
# processes use at the same time.
# HYPOTHESIS_EXAMPLES=2000 searches more thoroughly than each change needs.
settings.register_profile(
    "product",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "100")),
)
settings.load_profile("product")

SHARED = Path(__file__).resolve().parents[2] / "shared"
SLOW_FILE = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.(slow|real|slurm)\b", re.MULTILINE)


def pytest_configure(config: pytest.Config) -> None:
    """Let workers take files in the order below, and not those with the most tests first."""
    config.option.loadscopereorder = False


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import a file that ``make fast`` would leave out completely: imports take longest."""
    if not config.option.markexpr.startswith("not slow") or collection_path.suffix != ".py":
        return None
    return SLOW_FILE.search(collection_path.read_text(encoding="utf-8")) is not None or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of slow tests: the short ones at the end keep every worker busy."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def _imported() -> None:
    """Leave out of garbage collection what exists before the first test: the imported modules.

    The end of a run collects all garbage, which takes half a second with the modules of all tests.
    What tests make is never left out, so that a leak can be found.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reset_logging() -> Iterator[None]:
    """Undo the logging of a command under test: caplog needs records that propagate."""
    yield
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _reset_hints() -> Iterator[None]:
    """Remove the arguments of a command under test from the hints of the next test."""
    yield
    remember_arguments(None, ())


@pytest.fixture(autouse=True)
def _reset_environment() -> Iterator[None]:
    """Undo the variables that a command under test sets, e.g. to keep the hub client offline."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _node_disk(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give each test a separate folder to cache remote shards, instead of the machine's."""
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path_factory.mktemp("node")))


@pytest.fixture(scope="session")
def real_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 878 real movies as published: ``ProcessedTensor/``, pickles, split, ``meta/``."""
    unpack = SHARED / "movienet-clip-features" / "unpack.py"
    if not unpack.is_file():
        pytest.skip("the real features are missing next to this checkout")
    with made_once(tmp_path_factory, "real") as (out, missing):
        if missing:
            subprocess.run([sys.executable, str(unpack), str(out), "--meta"], check=True)
    return out


@pytest.fixture
def aws_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials for the S3 emulator, without the developer's own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
