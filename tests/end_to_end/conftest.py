"""The mini dump, sharded and encoded once by the real commands, for all end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.pipeline import CHECKOUT, Pipeline


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A pipeline whose folder contains ``demo-data``, up to its features."""
    pipeline = Pipeline(tmp_path_factory.mktemp("demo"), CHECKOUT / "configs" / "demo.yaml")
    pipeline.run("sharding", "demo")
    pipeline.run("sharding", "build")
    pipeline.run("encoders", "run")
    return pipeline


@pytest.fixture(scope="session")
def demo_data(demo: Pipeline) -> Path:
    """The folder ``demo-data``."""
    return demo.folder / "demo-data"
