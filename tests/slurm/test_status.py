"""What ``status`` shows of a chain, from the queue and the logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.client import QueueEntry
from slurm.freeze import Frozen, Submitted
from slurm.status import ChainStatus, Log, describe, read_log


def submitted(
    name: str, job_id: int | None, array: str | None = None, offset: int = 0
) -> Submitted:
    step = name.partition("-")[0]
    return Submitted(name, step, step, 8, array, offset, (), (), (), job_id=job_id)


def entry(job_id: int, index: int | None, state: str, reason: str = "None") -> QueueEntry:
    return QueueEntry(job_id, index, state, reason, "tb1", f"lstm.{job_id}")


def status(
    *jobs: Submitted,
    queue: tuple[QueueEntry, ...] = (),
    logs: dict[tuple[str, int | None], Log] | None = None,
) -> ChainStatus:
    return describe(Frozen(Path("/runs/lstm/submit-1"), "lstm.1", jobs), queue, logs or {})


def text(found: ChainStatus) -> str:
    return "\n".join(found.lines())


def test_a_chain_whose_jobs_all_ended_well_is_complete_though_slurm_has_forgotten_them() -> None:
    done = status(submitted("plan", 1), logs={("plan", None): Log(node="tb1", end="done")})
    assert done.complete
    assert text(done).split() == ["/runs/lstm/submit-1", "plan", "1", "done"]


def test_a_job_that_slurm_forgot_without_an_end_in_its_log_is_not_taken_for_done() -> None:
    lost = status(submitted("plan", 1))
    assert not lost.complete
    assert "unknown" in text(lost)


def test_tasks_of_an_array_are_counted_by_state_and_failures_are_named_with_node_and_error() -> (
    None
):
    shard = submitted("shard", 4, "0-3", offset=10)
    shown = text(
        status(
            shard,
            queue=(entry(4, 0, "RUNNING"), entry(4, 3, "PENDING")),
            logs={
                ("shard", 1): Log(node="tb2", end="failed", error="error: tt7.tar is truncated"),
                ("shard", 2): Log(node="tb1", end="done"),
            },
        )
    )
    assert "done 1   failed 1   running 1   waiting 1" in shown
    assert "failed tasks 11 on tb2: error: tt7.tar is truncated" in shown


def test_rates_of_running_tasks_are_summed_and_give_the_time_left() -> None:
    lines: dict[tuple[str, int | None], Log] = {
        ("shard", 0): Log(progress="build: 1,000/4,000 images  100/s  30 s left"),
        ("shard", 1): Log(progress="build: 2,000/4,000 images  150/s  13 s left"),
    }
    queue = (entry(4, 0, "RUNNING"), entry(4, 1, "RUNNING"))
    shown = text(status(submitted("shard", 4, "0-1"), queue=queue, logs=lines))
    assert "3,000 of 8,000 images   250.0 images/s   0 min left" in shown


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("launch failed requeued held", "scontrol release 9"),
        ("DependencyNeverSatisfied", "submit --resubmit-missing"),
        ("PartitionTimeLimit", "lower slurm.train.time"),
    ],
)
def test_a_job_that_waits_for_ever_is_shown_with_its_mend(reason: str, remedy: str) -> None:
    shown = text(status(submitted("train", 9), queue=(entry(9, None, "PENDING", reason),)))
    assert f"{reason}: " in shown
    assert remedy in shown


def test_a_running_task_whose_earlier_life_failed_is_running() -> None:
    log = Log(node="tb1", end="requeued")
    shown = text(
        status(
            submitted("train", 9), queue=(entry(9, None, "RUNNING"),), logs={("train", None): log}
        )
    )
    assert "running" in shown


def test_a_job_that_was_never_submitted_is_shown_with_the_command_that_submits_it() -> None:
    assert "submit --continue" in text(status(submitted("train", None)))


LOG = """\
== 2026-01-01 10:00:00 7_1 on tb1 life A begins, restart 0
error: of an earlier life
== 2026-01-01 10:00:09 7_1 on tb1 ends: requeued
== 2026-01-01 10:01:00 7_1 on tb2 life B begins, restart 1
wandb: https://wandb.ai/films/movienet-stream/runs/ab12cd34
2026-01-01 10:01:01 build: 10/40 images  10/s  3 s left
2026-01-01 10:01:02 build: 20/40 images  10/s  2 s left
"""


def test_a_log_is_read_from_its_last_life() -> None:
    assert read_log(LOG) == Log(
        node="tb2",
        progress="2026-01-01 10:01:02 build: 20/40 images  10/s  2 s left",
        link="https://wandb.ai/films/movienet-stream/runs/ab12cd34",
    )


def test_the_verdict_of_the_script_explains_a_failure_better_than_the_first_error() -> None:
    end = "failed: killed; out of memory?\n== 2026-01-01 10:02:00 7_1 on tb2 ends: failed\n"
    log = read_log(f"{LOG}error: a consequence\n{end}")
    assert (log.end, log.error) == ("failed", "killed; out of memory?")
