"""The disk space of a build is checked before its first shard."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from configs.errors import MachineError
from sharding.format.plan import PlannedMovie
from sharding.frame_space import check_space
from sharding.storage.memory import MemoryStorage
from sharding.storage.space import FreeSpace, Space
from tests.disks import small_disk
from tests.sharding.conftest import Run

pytestmark = pytest.mark.slow


def test_too_little_space_is_reported_before_the_first_byte() -> None:
    class Full(MemoryStorage):
        def space(self) -> FreeSpace:
            return FreeSpace(Space(10**6))

    movies = [PlannedMovie("a", "a", "a", "", 1000, 10**9, 0)]
    with pytest.raises(MachineError, match=r"got 1 MB free, want 1 GB for the frame shards"):
        check_space(Full(), movies)
    check_space(MemoryStorage(), movies)


def test_a_set_that_does_not_fit_is_refused_before_its_first_shard(
    run: Run, tmp_path: Path
) -> None:
    frames = tmp_path / "root" / "frames"
    with small_disk(frames, "64k"):
        code, _, err = run("build")
        assert code == 1
        assert " free, want " in err.splitlines()[-1]
        assert sorted(path.name for path in frames.iterdir()) == ["plan.json"]
        subprocess.run(["mount", "-o", "remount,size=4m", str(frames)], check=True)
        assert run("build")[1].startswith("sealed: movies 12")


def test_a_disk_without_files_left_is_refused(run: Run, tmp_path: Path) -> None:
    frames = tmp_path / "root" / "frames"
    with small_disk(frames, "4m,nr_inodes=6"):
        code, _, err = run("build")
        assert (code, " files free, want " in err.splitlines()[-1]) == (1, True)


def test_the_plan_prints_needed_and_free_space(run: Run) -> None:
    line = run("plan")[1].splitlines()[1]
    assert line.startswith("space needed ")
    assert " in 27 files   free " in line
