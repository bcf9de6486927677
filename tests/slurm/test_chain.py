"""Which jobs a chain has, and what each waits for."""

from __future__ import annotations

from typing import Any

import pytest

from configs.errors import ConfigError
from configs.schema_slurm import SlurmConfig
from slurm.chain import Job, plan_chain, waits_of


def chain(config: dict[str, Any] | None = None, **options: Any) -> dict[str, Job]:
    jobs = plan_chain(
        SlurmConfig.model_validate(config or {}),
        **{"run_name": "lstm", "max_array_size": 1001, **options},
    )
    return {job.name: job for job in jobs}


def waits(jobs: dict[str, Job]) -> dict[str, str]:
    return {job.name: waits_of(job.after_ok, job.after_any) for job in jobs.values()}


def test_the_chain_goes_from_the_dump_to_the_report_with_a_gate_after_each_array() -> None:
    assert waits(chain()) == {
        "plan": "",
        "shard": "afterok plan",
        "gate-frames": "afterok plan, afterany shard",
        "encode": "afterok gate-frames",
        "gate-features": "afterok gate-frames, afterany encode",
        "train": "afterok gate-features",
        "eval": "afterok train",
    }


def test_temporary_frames_need_no_frame_shards() -> None:
    assert waits(chain(temporary_frames=True)) == {
        "plan": "",
        "encode": "afterok plan",
        "gate-features": "afterok plan, afterany encode",
        "train": "afterok gate-features",
        "eval": "afterok train",
    }


def test_a_chain_may_begin_later() -> None:
    assert list(chain(first="encode")) == ["encode", "gate-features", "train", "eval"]
    assert chain(first="encode")["encode"].after_ok == ()


@pytest.mark.parametrize(
    ("only", "names"), [("shard", ["shard", "gate-frames"]), ("train", ["train"])]
)
def test_a_step_alone_keeps_its_gate(only: str, names: list[str]) -> None:
    assert list(chain(only=only)) == names


def test_a_grid_trains_and_scores_each_point_on_the_same_features() -> None:
    jobs = chain(grid=("training.seed=0,1", "training.lr=1e-3,3e-4"), first="train")
    assert list(jobs)[:2] == ["train-seed-0-lr-1e_3", "eval-seed-0-lr-1e_3"]
    assert len(jobs) == 8
    last = jobs["eval-seed-1-lr-3e_4"]
    assert last.after_ok == ("train-seed-1-lr-3e_4",)
    assert last.overrides == (
        *("training.seed=1", "training.lr=3e-4"),
        "training.run_name=lstm-seed-1-lr-3e_4",
    )


@pytest.mark.parametrize("grid", ["training.seed", "training.run_name=a,b", "training.seed=1,1"])
def test_a_grid_that_is_no_list_of_different_values_is_refused(grid: str) -> None:
    with pytest.raises(ConfigError, match="--grid: got"):
        chain(grid=(grid,))


def test_arrays_beyond_the_limit_of_the_cluster_are_split_and_share_one_gate() -> None:
    jobs = chain({"shard": {"tasks": 25}}, max_array_size=11, only="shard")
    assert [(job.array, job.offset) for job in jobs.values()] == [
        *(("0-10", 0), ("0-10", 11), ("0-2", 22), (None, 0))
    ]
    assert jobs["gate-frames"].after_any == ("shard", "shard-11", "shard-22")


def test_resubmitted_tasks_keep_the_number_of_tasks_that_the_stage_was_divided_into() -> None:
    jobs = chain({"shard": {"tasks": 8}}, first="shard", tasks={"shard": (3, 5)})
    assert (jobs["shard"].array, jobs["shard"].tasks) == ("3,5", 8)
    assert jobs["gate-frames"].tasks == 8
