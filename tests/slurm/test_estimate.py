"""Hours of the full set from the rates of a small one."""

from __future__ import annotations

import pytest

from configs.schema_slurm import SlurmConfig
from slurm.estimate import PlanSize, estimate, rate_of
from slurm.outcome import Life
from slurm.resources import resolve

FULL, SMALL = PlanSize(movies=1100, images=4_800_000), PlanSize(movies=20, images=80_000)


def life(step: int | None, seconds: float | None) -> Life:
    return Life(token=None, job="1", outcome="done", step=step, seconds=seconds)


def test_a_rate_counts_what_each_life_added_and_leaves_out_lives_without_an_end() -> None:
    assert rate_of([life(1000, 10), life(None, None), life(3000, 10)]) == 150.0


def test_a_task_without_work_has_no_rate() -> None:
    assert rate_of([life(0, 3)]) is None


def test_an_array_divides_the_images_among_the_tasks_that_run_at_the_same_time() -> None:
    config = SlurmConfig.model_validate({"encode": {"tasks": 8, "throttle": 4, "time": "10min"}})
    found = estimate(FULL, SMALL, {"encode": [[life(80_000, 80)]]}, resolve(config, "encode"))
    assert found is not None
    assert (found.rate, found.tasks, found.seconds, found.lives) == (1000.0, 4, 1200.0, 2)
    assert found.line().split("   ")[-1] == "1.3 job hours"


def test_the_steps_of_training_grow_with_the_number_of_movies() -> None:
    found = estimate(FULL, SMALL, {"train": [[life(100, 50)]]}, resolve(SlurmConfig(), "train"))
    assert found is not None
    assert (found.units, found.seconds) == (5500, 2750.0)


@pytest.mark.parametrize("stage", ["shard", "encode", "train"])
def test_a_stage_that_was_not_measured_has_no_estimate(stage: str) -> None:
    resources = resolve(SlurmConfig(), stage)  # type: ignore[arg-type]
    assert estimate(FULL, SMALL, {}, resources) is None
