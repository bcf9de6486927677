"""Training and encoding through time limits, preemption and dead machines, on a real Slurm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.slurm.cluster import Project, Submission, wait_until
from tests.slurm.conftest import MakeProject, copy_sets, make_slow

pytestmark = pytest.mark.slurm

TRAIN = ("--only", "train")
TWO_BY_TWO = ("slurm.train.nodes=2", "slurm.train.ranks=2")


def train_steps(project: Project) -> list[int]:
    """Return the steps in the run's metrics, in the order of their lines."""
    path = project.run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record["step"] for record in records if record["kind"] == "train"]


def at_step(project: Project, step: int) -> None:
    """Wait until the run has done a step."""
    wait_until(
        lambda: max(train_steps(project), default=0) >= step, within_s=120, what=f"step {step}"
    )


def lives(project: Project) -> list[tuple[str, str | None]]:
    return [(record["outcome"], record["job"]) for record in project.records(project.run_dir)]


def wait_for_life(project: Project, number: int) -> None:
    """Wait until so many lives of the run have begun."""
    wait_until(lambda: len(lives(project)) >= number, what=f"life {number}")


def signal_batch(submission: Submission, name: str = "train") -> None:
    """Send what Slurm sends before the time limit, to the batch shell alone."""
    submission.cluster.slurm("scancel", "--batch", "--signal=USR1", str(submission.ids[name]))


def interrupt(submission: Submission, project: Project) -> None:
    """End a life as the time limit does, and wait for the next one."""
    before = len(lives(project))
    signal_batch(submission)
    wait_until(lambda: lives(project)[before - 1][0] == "interrupted", within_s=60)
    wait_until(lambda: len(lives(project)) > before, within_s=60)


def weights(project: Project) -> dict[str, bytes]:
    files = sorted((project.run_dir / "checkpoints" / "last").glob("*.safetensors"))
    return {
        f"{file.name}/{name}": value.tobytes()
        for file in files
        for name, value in load_file(file).items()
        if file.name.startswith("model")
    }


def wandb_steps(folder: Path) -> tuple[set[str], set[int]]:
    """Return the ids of the offline runs in a folder, and the training steps that they hold."""
    ids, steps = set(), set()
    for path in (folder / "wandb").glob("offline-run-*/*.wandb"):
        ids.add(path.stem.removeprefix("run-"))
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            record = json.loads(line)
            item = record["history"]["item"] if record["type"] == "history" else {}
            if "train/loss" in item:
                steps.add(int(item["step"]))
    return ids, steps


def test_a_run_that_meets_its_time_limit_three_times_loses_no_step_and_stays_one_run(
    trained_project: Project,
) -> None:
    project = trained_project
    submission = project.submit(*TRAIN, "training.epochs=30", "tracking.wandb=offline")
    for step in (5, 60, 120):
        at_step(project, step)
        interrupt(submission, project)
    assert submission.wait(within_s=200) == {"train": "COMPLETED"}
    assert [outcome for outcome, _ in lives(project)] == [*["interrupted"] * 3, "done"]
    steps = train_steps(project)
    assert steps == list(range(1, len(steps) + 1))
    ids, shown = wandb_steps(project.run_dir)
    assert len(ids) == 1
    assert shown == set(steps)


SLOW = """\
import time
import torch

class Slow(torch.nn.Module):
    def __init__(self, *, dim, genres):
        super().__init__()
        self.head = torch.nn.Linear(dim, genres)

    def forward(self, features, mask):
        time.sleep(0.06)
        real = mask.unsqueeze(-1).float()
        return self.head((features * real).sum(1) / real.sum(1))
"""
"""A model that takes its time without the processor."""


def slow_down(project: Project) -> None:
    """Train a model that does about 15 steps a second."""
    (project.folder / "slow.py").write_text(SLOW)
    project.change(model={"class": "./slow.py:Slow", "options": {}})


def test_a_run_that_really_meets_its_time_limit_is_signalled_saved_and_requeued(
    trained_project: Project,
) -> None:
    project = trained_project
    slow_down(project)
    submission = project.submit(
        *TRAIN, "training.epochs=100000", "slurm.train.time=2min", "slurm.train.lead=25s"
    )
    wait_until(
        lambda: "ends: requeued" in submission.log("train"), within_s=130, what="the time limit"
    )
    assert "received SIGUSR1" in submission.log("train")
    assert lives(project)[0][0] == "interrupted"
    wait_until(lambda: len(lives(project)) == 2, within_s=60)
    at_step(project, max(train_steps(project)) + 5)
    project.cluster.slurm("scancel", str(submission.ids["train"]))
    assert submission.wait(within_s=60) == {"train": "CANCELLED"}
    assert lives(project)[1][0] == "interrupted"
    jobs = [job for job in project.cluster.jobs() if job["JobId"] == str(submission.ids["train"])]
    assert jobs[0]["Restarts"] == "1"


def test_a_preempted_run_on_four_ranks_ends_with_the_weights_of_an_undisturbed_one(
    trained_project: Project,
) -> None:
    project, cluster = trained_project, trained_project.cluster
    options = (*TRAIN, *TWO_BY_TWO, "training.epochs=20", 'slurm.extra=["--exclusive"]')
    project.run_forked("movienet-train", "run", "training.epochs=20", ranks=4)
    expected = weights(project)
    assert expected
    project.run_dir.rename(project.run_dir.with_name("undisturbed"))
    try:
        submission = project.submit(*options)
        for life, mode in enumerate(("REQUEUE", "CANCEL"), 1):
            cluster.slurm("scontrol", "update", "PartitionName=main", f"PreemptMode={mode}")
            at_step(project, 60 * life)
            preempt(project, submission)
            wait_for_life(project, life + 1)
        assert submission.wait(within_s=200) == {"train": "COMPLETED"}, submission.logs()
    finally:
        cluster.slurm("scontrol", "update", "PartitionName=main", "PreemptMode=REQUEUE")
    assert [outcome for outcome, _ in lives(project)] == ["interrupted", "interrupted", "done"]
    assert weights(project) == expected


def preempt(project: Project, submission: Submission) -> None:
    """Run a short urgent job on the nodes of the training job."""
    jobs = {job["JobId"]: job for job in project.cluster.jobs()}
    nodes = jobs[str(submission.ids["train"])]["NodeList"]
    urgent = ["sbatch", "--partition=urgent", f"--nodelist={nodes}", "--nodes=2", "--exclusive"]
    urgent.append("--output=/dev/null")
    subprocess.run(
        [*urgent, "--wrap=sleep 1"], check=True, env=project.environment, capture_output=True
    )


def test_a_node_that_dies_under_a_run_costs_no_step_that_was_saved(
    trained_project: Project,
) -> None:
    project, cluster = trained_project, trained_project.cluster
    submission = project.submit(*TRAIN, "training.epochs=25", "training.checkpoint_steps=9")
    at_step(project, 40)
    node = next(job["NodeList"] for job in cluster.jobs() if job["JobState"] == "RUNNING")
    cluster.call("kill-node", node)
    try:
        assert submission.wait(within_s=240) == {"train": "COMPLETED"}
    finally:
        cluster.call("revive", node)
    assert [outcome for outcome, _ in lives(project)] == ["running", "done"]
    steps = train_steps(project)
    assert steps == list(range(1, len(steps) + 1))


def test_a_run_whose_daemon_crashed_goes_on_in_the_next_life_with_each_step_once(
    trained_project: Project,
) -> None:
    # the job is started again while its first life may still be at work
    project, cluster = trained_project, trained_project.cluster
    slow_down(project)
    submission = project.submit(*TRAIN, "training.epochs=100", "training.checkpoint_steps=50")
    at_step(project, 60)
    node = next(job["NodeList"] for job in cluster.jobs() if job["JobState"] == "RUNNING")
    cluster.call("crash-slurmd", node)
    try:
        wait_until(lambda: len(lives(project)) == 2, within_s=120, what="the second life")
        assert submission.wait(within_s=240) == {"train": "COMPLETED"}, submission.logs()
    finally:
        cluster.call("revive", node)
    records = project.records(project.run_dir)
    assert records[-1]["outcome"] == "done"
    assert records[0]["job"] == records[-1]["job"]
    assert records[0]["token"] != records[-1]["token"]
    steps = train_steps(project)
    assert steps == list(range(1, len(steps) + 1))


def test_two_lives_of_a_crashed_daemon_at_the_same_features_change_no_byte_of_them(
    make_project: MakeProject, local_run: Project
) -> None:  # the first life stays at work while the second one encodes
    project = make_slow(make_project, 1, "/frames/frames-")
    cluster = project.cluster
    copy_sets(local_run, project, "frames")
    submission = project.submit("--only", "encode", "slurm.encode.tasks=1")
    features = project.folder / "data" / "features" / "demo"
    wait_until(lambda: list(features.glob("features-*.json")), within_s=120)
    node = next(job["NodeList"] for job in cluster.jobs() if job["JobState"] == "RUNNING")
    cluster.call("crash-slurmd", node)
    try:
        states = submission.wait(within_s=240)
        assert set(states.values()) == {"COMPLETED"}, submission.logs()
    finally:
        cluster.call("revive", node)
    text = submission.log("encode", 0)
    assert text.count(" begins, restart ") == 2
    assert re.search("published by another attempt|published by a concurrent task", text)
    assert project.digest("features/demo") == local_run.digest("features/demo")
    assert project.run("movienet-encode", "verify").rstrip().endswith("ok")


def test_a_node_that_dies_under_encoding_changes_no_byte_of_the_features(
    project: Project, local_run: Project
) -> None:
    cluster = project.cluster
    copy_sets(local_run, project, "frames")
    submission = project.submit("--only", "encode", "slurm.encode.tasks=1", "slurm.encode.ranks=2")
    features = project.folder / "data" / "features" / "demo"
    wait_until(lambda: list(features.glob("features-*.json")), within_s=120)
    node = next(job["NodeList"] for job in cluster.jobs() if job["JobState"] == "RUNNING")
    cluster.call("kill-node", node)
    try:
        states = submission.wait(within_s=240)
        assert set(states.values()) == {"COMPLETED"}, submission.logs()
    finally:
        cluster.call("revive", node)
    assert project.digest("features/demo") == local_run.digest("features/demo")
    assert project.run("movienet-encode", "verify").rstrip().endswith("ok")
