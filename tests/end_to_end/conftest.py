"""The mini dump, sharded and encoded once by the real commands, for all end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.pipeline import Pipeline
from tests.end_to_end.tutorial import steps
from tests.made_once import made_once

MADE_BY = (("sharding", "demo"), ("sharding", "build"), ("encoders", "run"))
"""Commands that make what the tests share, in this order."""


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A pipeline whose folder contains ``demo-data``, up to its features."""
    with made_once(tmp_path_factory, "demo") as (folder, missing):
        pipeline = Pipeline(folder, Path("demo"))
        if missing:
            folder.mkdir()
            for step in steps():  # those of the tutorial, which a test compares with its page
                if (step.package, step.command) in MADE_BY:
                    step.run(pipeline)
    return pipeline


@pytest.fixture(scope="session")
def demo_data(demo: Pipeline) -> Path:
    """The folder ``demo-data``."""
    return demo.folder / "demo-data"
