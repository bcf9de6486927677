"""A dump that changed after planning is refused until the plan is replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import DataError
from sharding.storage.memory import MemoryStorage
from tests.sharding.conftest import Run
from tests.sharding.films import build_all, film, write_folder, write_tar

MOVIE = "tt0032138"


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_a_source_that_changed_after_planning_is_refused_until_replanned(
    tmp_path: Path, write: Callable[..., None]
) -> None:
    write(tmp_path, MOVIE, film(MOVIE))
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    write(tmp_path, MOVIE, film(MOVIE, shots=3), mtime=10**18 + 1)
    with pytest.raises(
        DataError, match=r"1 changed \(tt0032138\); run `movienet-shard plan --replace"
    ):
        build_all(storage, tmp_path)
    fresh = MemoryStorage()
    fresh.files["plan.json"] = storage.read("plan.json")
    with pytest.raises(DataError, match=r"changed since it was planned .9 images now, 6 then"):
        build_published_plan(fresh, tmp_path)
    assert build_all(storage, tmp_path, replace=True).samples == 9


def build_published_plan(storage: MemoryStorage, dump: Path) -> None:
    from sharding.frames import read_plan
    from tests.sharding.films import build_planned

    plan = read_plan(storage)
    assert plan is not None
    build_planned(storage, dump, plan)


def test_a_shard_of_another_source_is_refused_with_the_command_that_replaces_it(
    tmp_path: Path,
) -> None:
    from sharding.build import publish_plan
    from sharding.dump.scan import read_movies
    from sharding.plan import make_plan

    write_tar(tmp_path, MOVIE, film(MOVIE))
    storage = MemoryStorage()
    build_all(storage, tmp_path)
    write_tar(tmp_path, MOVIE, film(MOVIE, shots=3), mtime=10**18 + 1)
    publish_plan(storage, make_plan(read_movies(tmp_path), shard_bytes=4_000), replace=True)
    with pytest.raises(DataError, match="run `movienet-shard build --replace --config"):
        build_published_plan(storage, tmp_path)


@pytest.mark.slow
def test_each_task_is_tracked_as_a_separate_run(run: Run, tmp_path: Path) -> None:
    for task in ("0/2", "1/2"):
        assert run("build", "--task", task, "tracking.wandb=offline")[0] == 0
    folder = tmp_path / "root" / "runs" / "shard"
    runs = list(folder.glob("task-*-of-2/wandb/offline-run-*/*.wandb"))
    assert len(runs) == 2
    for path in runs:
        data = path.read_bytes()
        assert b"shard" in data
        assert b"movies_left" in data
