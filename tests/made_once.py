"""Folders that the first of several workers of pytest makes for all of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock


@contextmanager
def made_once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """Yield a folder, and whether the caller has to make it; the other workers wait meanwhile.

    If making it fails, the folder is removed, so that the next worker fails for the same reason.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    made = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        missing = not made.exists()
        try:
            yield folder, missing
        except BaseException:
            if missing:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        made.touch()
