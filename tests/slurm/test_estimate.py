"""Hours of the full set from the rates of a small one."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.schema_slurm import SlurmConfig
from slurm.estimate import PlanSize, estimate, rate_of
from slurm.outcome import Life
from slurm.resources import resolve
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import new_project

FULL = PlanSize(movies=1100, images=4_800_000, n_bytes=161_000_000_000)
SMALL = PlanSize(movies=20, images=80_000, n_bytes=3_000_000_000)


def life(step: int | None, seconds: float | None) -> Life:
    return Life(token=None, job="1", outcome="done", step=step, seconds=seconds)


def test_a_rate_counts_what_each_life_added() -> None:
    assert rate_of([life(1000, 10), life(2500, 10)]) == 125.0


def test_a_rate_leaves_out_a_killed_life_and_the_next_one_which_counts_the_work_of_both() -> None:
    lives = [life(1000, 10), life(None, None), life(3000, 10), life(3500, 10)]
    assert rate_of(lives) == 75.0
    assert rate_of([life(None, None), life(3000, 10)]) is None


def test_a_task_without_work_has_no_rate() -> None:
    assert rate_of([life(0, 3)]) is None


def test_an_array_divides_the_images_among_the_tasks_that_run_at_the_same_time() -> None:
    config = SlurmConfig.model_validate({"encode": {"tasks": 8, "throttle": 4, "time": "10min"}})
    found = estimate(FULL, SMALL, {"encode": [[life(80_000, 80)]]}, resolve(config, "encode"))
    assert found is not None
    assert (found.rate, found.tasks, found.seconds, found.lives) == (1000.0, 4, 1200.0, 2)
    assert found.line().split("   ")[-1] == "1.3 job hours"


def test_images_that_a_plan_lacks_grow_with_its_bytes() -> None:
    # The plan of remote tars or of videos: `movienet-shard status` prints "images unknown".
    full, small = (PlanSize(one.movies, None, one.n_bytes) for one in (FULL, SMALL))
    lives = {"encode": [[life(40_000, 40)], [life(10_000, 10), life(20_000, 10)]]}
    found = estimate(full, small, lives, resolve(SlurmConfig(), "encode"))
    assert found is not None
    assert (found.units, found.rate) == (60_000 * 161 / 3, 1000.0)


def test_the_steps_of_training_grow_with_the_number_of_movies() -> None:
    found = estimate(FULL, SMALL, {"train": [[life(100, 50)]]}, resolve(SlurmConfig(), "train"))
    assert found is not None
    assert (found.units, found.seconds) == (5500, 2750.0)


def test_sharding_is_counted_in_bytes_of_the_dump() -> None:
    config = SlurmConfig.model_validate({"shard": {"tasks": 10}})
    found = estimate(FULL, SMALL, {"shard": [[life(3_000_000_000, 30)]]}, resolve(config, "shard"))
    assert found is not None
    assert (found.units, found.rate, found.seconds) == (161_000, 100.0, 161.0)
    assert "161,000 MB   100.0 MB/s per task, 10 tasks   00:02:41" in found.line()


@pytest.mark.parametrize("stage", ["shard", "encode", "train"])
def test_a_stage_that_was_not_measured_has_no_estimate(stage: str) -> None:
    resources = resolve(SlurmConfig(), stage)  # type: ignore[arg-type]
    assert estimate(FULL, SMALL, {}, resources) is None


@pytest.mark.slow
def test_an_estimate_reads_the_plan_and_the_records_of_the_small_run(
    installed: Path, mini_dump: Path, tmp_path: Path
) -> None:
    nowhere = Cluster(tmp_path, conf="")
    project = new_project(nowhere, installed, mini_dump, tmp_path / "films")
    refused = project.command("movienet-slurm", "estimate")
    assert "no plan yet; run `movienet-shard plan" in refused.stderr
    project.run("movienet-shard", "plan")
    for command in (
        ("movienet-shard", "build"),
        ("movienet-encode", "run"),
        ("movienet-train", "run", "training.epochs=1"),
    ):
        project.run_forked(*command, "data.limit=20")
    lines = project.run("movienet-slurm", "estimate").splitlines()
    assert [line.split()[0] for line in lines] == ["shard", "encode", "train"]
    assert "41 MB" in lines[0]
    assert "per task, 4 tasks" in lines[0]
    assert "22,947 images" in lines[1]
    assert "images/s per task, 2 tasks" in lines[1]
    assert "steps/s" in lines[2]
