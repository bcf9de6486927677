"""Signals, requeues, preemption and dead machines on a real Slurm, with the shard stage."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Project, Submission, wait_until
from tests.slurm.conftest import MakeProject, make_slow

pytestmark = pytest.mark.slurm

SHARD = ("--only", "shard")


def working(submission: Submission, index: int) -> None:
    """Wait until an array task is at work in its newest life."""
    wait_until(
        lambda: "shards: " in submission.log("shard", index).rpartition("begins")[2],
        within_s=60,
        what=f"task {index} at work",
    )


def records(project: Project, task: str) -> list[tuple[str, int | None]]:
    folder = project.folder / "data" / "runs" / "shard" / f"task-{task}"
    return [(record["outcome"], record["step"]) for record in project.records(folder)]


def wait_for_lives(project: Project, task: str, number: int) -> None:
    """Wait until a task has begun so many lives."""
    wait_until(lambda: len(records(project, task)) == number, what=f"life {number}")


def wait_for_end(project: Project, task: str, life: int, end: tuple[str, int | None]) -> None:
    """Wait until a life has ended in a certain way."""
    wait_until(lambda: records(project, task)[life - 1] == end, what=f"life {life}: {end}")


def signal_batch(submission: Submission, index: int, signal: str = "USR1") -> None:
    """Send what Slurm sends before the time limit, to the batch shell alone."""
    submission.cluster.slurm(
        "scancel", "--batch", f"--signal={signal}", submission.task_id("shard", index)
    )


def wandb_runs(folder: Path) -> set[str]:
    """Return the ids of the offline runs in a folder; a run has one file per life."""
    paths = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(paths) > 1
    return {path.stem.removeprefix("run-") for path in paths}


def restarts(submission: Submission, index: int) -> int:
    jobs = [job for job in submission.cluster.jobs() if job.get("ArrayTaskId") == str(index)]
    mine = [job for job in jobs if job["ArrayJobId"] == str(submission.ids["shard"])]
    return int(mine[0]["Restarts"])


@pytest.mark.parametrize("index", [1, 2])
def test_a_task_near_its_time_limit_saves_and_requeues_itself_alone(
    slow_project: Project, index: int
) -> None:  # requeueing the last task by its job id restarts the array
    submission = slow_project.submit(*SHARD, "slurm.shard.tasks=3", "tracking.wandb=offline")
    working(submission, index)
    wait_until(lambda: records(slow_project, f"{index}-of-3"))
    signal_batch(submission, index)
    wait_until(lambda: "ends: requeued" in submission.log("shard", index), within_s=30)
    states = submission.wait()
    assert set(states.values()) == {"COMPLETED"}
    assert [restarts(submission, other) for other in range(3)] == [
        int(other == index) for other in range(3)
    ]
    lives = records(slow_project, f"{index}-of-3")
    assert [outcome for outcome, _ in lives] == ["interrupted", "done"]
    text = submission.log("shard", index)  # the log of the first life is still here
    assert text.count(" begins, restart ") == 2
    task = slow_project.folder / "data" / "runs" / "shard" / f"task-{index}-of-3"
    assert len(wandb_runs(task)) == 1


def test_a_cancelled_task_saves_and_stays_cancelled(slow_project: Project) -> None:
    submission = slow_project.submit(*SHARD, "slurm.shard.tasks=2")
    working(submission, 1)
    slow_project.cluster.slurm("scancel", submission.task_id("shard", 1))
    states = submission.wait()
    assert states["shard_1"] == "CANCELLED"
    assert restarts(submission, 1) == 0
    assert [outcome for outcome, _ in records(slow_project, "1-of-2")] == ["interrupted"]
    assert states["gate-frames"] == "FAILED"


def test_a_task_that_makes_no_progress_in_two_lives_fails(make_project: MakeProject) -> None:
    project = make_slow(make_project, 1, "/240P/")
    project.run("movienet-shard", "plan")
    submission = project.submit(*SHARD, "slurm.shard.tasks=1")
    for life in (1, 2):
        wait_for_lives(project, "0-of-1", life)
        working(submission, 0)
        signal_batch(submission, 0)
        wait_for_end(project, "0-of-1", life, ("interrupted", 0))
    assert submission.wait()["shard_0"] == "FAILED"
    assert "2 lives in a row made no progress" in submission.log("shard", 0)


def run_urgent_job(project: Project, node: str) -> None:
    """Submit a short job that preempts those on a node."""
    options = ["--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null"]
    command = ["sbatch", *options, "--wrap=sleep 1"]
    subprocess.run(command, check=True, capture_output=True, env=project.environment)


@pytest.fixture
def preempt_mode(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[None]:
    """The way in which `main` is preempted."""
    cluster.slurm("scontrol", "update", "PartitionName=main", f"PreemptMode={request.param}")
    yield
    cluster.slurm("scontrol", "update", "PartitionName=main", "PreemptMode=REQUEUE")


@pytest.mark.parametrize("preempt_mode", ["REQUEUE", "CANCEL"], indirect=True)
@pytest.mark.usefixtures("preempt_mode")
def test_a_preempted_task_goes_on_by_itself(slow_project: Project, cluster: Cluster) -> None:
    submission = slow_project.submit(*SHARD, "slurm.shard.tasks=1", 'slurm.extra=["--exclusive"]')
    working(submission, 0)
    node = next(job["NodeList"] for job in cluster.jobs() if job["JobState"] == "RUNNING")
    run_urgent_job(slow_project, node)
    states = submission.wait()
    assert states == {"shard_0": "COMPLETED", "gate-frames": "COMPLETED"}
    lives = [outcome for outcome, _ in records(slow_project, "0-of-1")]
    assert lives == ["interrupted", "done"]
    assert "preempted at step" in submission.log("shard", 0)


@pytest.fixture
def preemption_signal(cluster: Cluster) -> Iterator[None]:
    """A site that sends the signal of ``--signal`` when it preempts a job."""
    conf = Path(cluster.conf)
    before = conf.read_text()
    conf.write_text(f"{before}\nSlurmctldParameters=preempt_send_user_signal\n")
    cluster.slurm("scontrol", "reconfigure")
    yield
    conf.write_text(before)
    cluster.slurm("scontrol", "reconfigure")


@pytest.mark.usefixtures("preemption_signal")
def test_a_task_that_is_told_of_its_preemption_by_a_signal_goes_on_by_itself(
    slow_project: Project, cluster: Cluster
) -> None:
    submission = slow_project.submit(*SHARD, "slurm.shard.tasks=1", 'slurm.extra=["--exclusive"]')
    working(submission, 0)
    node = next(job["NodeList"] for job in cluster.jobs() if job["JobState"] == "RUNNING")
    run_urgent_job(slow_project, node)
    states = submission.wait()
    assert states == {"shard_0": "COMPLETED", "gate-frames": "COMPLETED"}
    assert "received SIGUSR1" in submission.log("shard", 0)
    assert [outcome for outcome, _ in records(slow_project, "0-of-1")] == ["interrupted", "done"]


def test_a_node_that_dies_under_a_task_changes_no_byte_of_the_set(
    slow_project: Project, cluster: Cluster, local_run: Project
) -> None:
    submission = slow_project.submit(*SHARD, "slurm.shard.tasks=2", 'slurm.extra=["--exclusive"]')
    working(submission, 1)
    node = next(
        job["NodeList"]
        for job in cluster.jobs()
        if job.get("ArrayTaskId") == "1" and job["JobState"] == "RUNNING"
    )
    cluster.call("kill-node", node)
    try:
        assert set(submission.wait(within_s=150).values()) == {"COMPLETED"}
    finally:
        cluster.call("revive", node)
    assert [outcome for outcome, _ in records(slow_project, "1-of-2")] == ["running", "done"]
    assert slow_project.digest() == local_run.digest()
    assert slow_project.run("movienet-shard", "verify").rstrip().endswith("ok")


def test_a_controller_that_is_away_neither_loses_nor_doubles_a_job(
    slow_project: Project, cluster: Cluster
) -> None:
    running = slow_project.submit(*SHARD, "slurm.shard.tasks=2")
    cluster.wait_saved()
    working(running, 0)
    signal_batch(running, 0)  # its requeue meets the controller's absence
    cluster.call("kill-node", "ctl")
    back = threading.Timer(30, lambda: cluster.call("revive", "ctl"))
    back.start()
    start = time.monotonic()
    late = slow_project.submit("--only", "eval")  # sbatch meets it too
    assert time.monotonic() - start > 10
    back.join()
    slow_project.run("movienet-slurm", "cancel")
    states = running.wait(within_s=180)
    assert set(states.values()) == {"COMPLETED"}
    assert len([job for job in cluster.jobs() if job["JobId"] == str(late.ids["eval"])]) == 1
    outcomes = [outcome for outcome, _ in records(slow_project, "0-of-2")]
    assert outcomes == ["interrupted", "done"]
