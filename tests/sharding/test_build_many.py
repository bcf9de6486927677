"""A set has the same bytes for any number of tasks and workers and any listing order."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.sharding.conftest import Run, contents, write_config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("workers", [1, 4])
def test_tasks_and_workers_give_the_same_bytes(
    run: Run, tmp_path: Path, expected: dict[str, bytes], tasks: int, workers: int
) -> None:
    for task in reversed(range(tasks)):
        code, _, err = run("build", "--task", f"{task}/{tasks}", f"sharding.workers={workers}")
        assert (code, "error" in err) == (0, False)
    assert contents(tmp_path / "root" / "frames") == expected


def test_another_order_of_listing_gives_the_same_bytes(
    run: Run, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    # The listing order of a folder depends on the order in which its files were created.
    write_config(tmp_path, root="other", dump="copy")
    (tmp_path / "copy").mkdir()
    for source in sorted((tmp_path / "dump").iterdir(), reverse=True):
        if source.is_file():
            subprocess.run(["cp", "-p", source, tmp_path / "copy"], check=True)
            continue
        (tmp_path / "copy" / source.name).mkdir()
        for image in sorted(source.iterdir(), reverse=True):
            subprocess.run(["cp", "-p", image, tmp_path / "copy" / source.name], check=True)
    assert run("build", config="other")[0] == 0
    assert contents(tmp_path / "other" / "frames") == expected
