"""The mini dump, sharded and encoded once by the real commands; the tests of the road share it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.road import CHECKOUT, Road


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """A road on which ``demo-data`` lies, up to its features."""
    road = Road(tmp_path_factory.mktemp("demo"), CHECKOUT / "configs" / "demo.yaml")
    road.run("sharding", "demo")
    road.run("sharding", "build")
    road.run("encoders", "run")
    return road


@pytest.fixture(scope="session")
def demo_data(demo: Road) -> Path:
    """The folder ``demo-data``."""
    return demo.folder / "demo-data"
