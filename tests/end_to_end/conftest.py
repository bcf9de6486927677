"""The mini dump, sharded and encoded once by the real commands, for all end-to-end tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.end_to_end.pipeline import Pipeline
from tests.end_to_end.tutorial import steps

MADE_BY = (("sharding", "demo"), ("sharding", "build"), ("encoders", "run"))
"""Commands that make what the tests share, in this order."""


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A pipeline whose folder contains ``demo-data``, up to its features.

    The workers of pytest-xdist have their folders in a common one; the first of them makes it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    pipeline = Pipeline(folder, Path("demo"))
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "made").exists():
            folder.mkdir()
            for step in steps():  # those of the tutorial, which a test compares with its page
                if (step.package, step.command) in MADE_BY:
                    step.run(pipeline)
            (folder / "made").touch()
    return pipeline


@pytest.fixture(scope="session")
def demo_data(demo: Pipeline) -> Path:
    """The folder ``demo-data``."""
    return demo.folder / "demo-data"
