"""Arrays, gates and dependencies on a real Slurm, with the shard stage, which starts in seconds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import CHECKOUT, Cluster, Project, Submission, wait_until

pytestmark = pytest.mark.slurm


@pytest.fixture
def reference(local_run: Project) -> str:
    """The manifest that the local run of the same configuration makes."""
    return local_run.digest()


def shards_of(project: Project, task: int, tasks: int) -> str:
    """Return the shards of a task as a rerun of it would name them."""
    done = project.command("movienet-shard", "status", "--tasks", str(tasks))
    assert f"--array={task}" in done.stdout
    return done.stdout


def test_an_array_beyond_the_limit_of_the_cluster_builds_the_set_that_a_local_run_builds(
    project: Project, reference: str
) -> None:  # MaxArraySize is 11
    submission = project.submit("--only", "shard", "slurm.shard.tasks=25")
    states = submission.wait()
    assert {name.partition("_")[0] for name in states} == {
        *("shard", "shard-11", "shard-22", "gate-frames")
    }
    assert len(states) == 26
    assert set(states.values()) == {"COMPLETED"}
    assert project.digest() == reference
    status = project.command("movienet-slurm", "status")
    assert status.returncode == 0, status.stdout


def test_a_killed_array_task_is_named_by_the_gate_and_a_resubmission_completes_the_chain(
    slow_project: Project,
) -> None:
    project = slow_project
    submission = project.submit("slurm.train.nodes=1")
    submission.wait_for("shard_2", "RUNNING")
    wait_until(lambda: "shards: " in submission.log("shard", 2))
    project.cluster.slurm("scancel", "--signal=KILL", f"{submission.task_id('shard', 2)}.0")
    states = submission.wait()
    assert states["shard_2"] == "FAILED"
    assert states["gate-frames"] == "FAILED"
    assert {states[name] for name in ("encode_0-1", "gate-features", "train", "eval")} == {
        "CANCELLED"
    }
    assert "incomplete tasks of 4: --array=2" in submission.log("gate-frames")
    status = project.command("movienet-slurm", "status")
    assert status.returncode == 1
    assert "failed tasks 2 on tb" in status.stdout
    assert "rank 0 was killed by signal 9; out of memory?" in status.stdout
    assert "submit --resubmit-missing" in status.stdout

    again = project.submit("--resubmit-missing", "--only", "shard")
    assert again.wait() == {"shard_2": "COMPLETED", "gate-frames": "COMPLETED"}


def test_a_chain_is_not_changed_by_editing_configuration_and_checkout_while_it_waits(
    project: Project, reference: str, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    for package in ("configs", "sharding", "encoders", "training", "eval", "slurm"):
        shutil.copytree(CHECKOUT / package, checkout / package)
    project.environment["PYTHONPATH"] = str(checkout)
    project.cluster.slurm("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        submission = project.submit("--only", "shard")
        project.change(sharding={"shard_bytes": "1MiB"})
        Path(project.folder / "site.sh").write_text("exit 3\n")
        for module in checkout.glob("*/__init__.py"):
            module.write_text("raise RuntimeError('edited')\n")
        (checkout / "slurm" / "shard.sbatch").write_text("exit 4\n")
    finally:
        project.cluster.slurm("scontrol", "update", "PartitionName=main", "State=UP")
    assert set(submission.wait().values()) == {"COMPLETED"}
    assert project.digest() == reference


@pytest.mark.parametrize(
    ("step", "refusal"), [("encode", "not sealed"), ("eval", "training is not begun, want done")]
)
def test_a_job_whose_forerunner_was_purged_still_refuses_incomplete_input(
    project: Project, cluster: Cluster, step: str, refusal: str
) -> None:  # Slurm runs `afterok` of a job that it has forgotten
    project.run("movienet-shard", "plan")
    submission = project.submit("--only", step, "slurm.encode.tasks=1")
    script = submission.folder / f"{step}.sbatch"
    cluster.clean()
    orphan = subprocess.run(
        ["sbatch", "--parsable", "--dependency=afterok:99999", str(script)],
        capture_output=True,
        text=True,
        env=project.environment,
        check=True,
    ).stdout.strip()
    wait_until(lambda: "ends: failed" in log_of(submission.folder, orphan), within_s=60)
    assert refusal in log_of(submission.folder, orphan)


def log_of(folder: Path, job_id: str) -> str:
    return "".join(path.read_text() for path in (folder / "logs").glob(f"*-{job_id}*.out"))


def test_a_refused_job_names_what_is_submitted_and_continue_submits_the_rest(
    project: Project, cluster: Cluster
) -> None:
    late = "slurm.gate.reservation=films"
    refused = project.command("movienet-slurm", "submit", "--only", "shard", late)
    assert refused.returncode == 1
    assert "error: sbatch refused lstm.1." in refused.stderr
    assert "submitted so far: shard " in refused.stderr
    assert f"`movienet-slurm submit --continue --config {project.config} " in refused.stderr
    place = ("nodes=tb1", "users=root", "flags=ignore_jobs")
    reserve = ("reservation=films", "starttime=now", "duration=10", *place)
    assert "Reservation created" in cluster.slurm("scontrol", "create", *reserve)
    try:
        before = project.submission().ids["shard"]
        submission = project.submit("--continue", late)
        assert submission.ids["shard"] == before
        assert submission.wait()["gate-frames"] == "COMPLETED"
    finally:
        cluster.clean()
        cluster.slurm("scontrol", "delete", "reservation=films")


def test_cancel_ends_the_chain_from_its_end_so_that_no_later_job_starts(
    slow_project: Project,
) -> None:
    submission = slow_project.submit("--from", "shard")
    submission.wait_for("shard_0", "RUNNING")
    lines = slow_project.run("movienet-slurm", "cancel").splitlines()
    assert [line.split()[-1] for line in lines] == [
        *("eval", "train", "gate-features", "encode", "gate-frames", "shard")
    ]
    states = submission.wait()
    assert {state for name, state in states.items() if not name.startswith("shard")} == {
        "CANCELLED"
    }


def submit_within_a_job(project: Project, *words: str) -> Submission:
    """Submit the chain from a task of an array, whose variables are not meant for our jobs."""
    script = project.folder / "outer.sbatch"
    command = ["movienet-slurm", "submit", "--config", str(project.config), *words]
    script.write_text(f"#!/bin/bash\n. {project.folder}/site.sh\n{' '.join(command)}\n")
    options = ["--array=7", "--cpus-per-task=3", "--mem-per-cpu=100", "--time=1"]
    output = project.folder / "outer.out"
    outer = ["sbatch", "--wait", f"--output={output}", *options, str(script)]
    done = subprocess.run(
        outer, cwd=project.folder, env=project.environment, check=False, timeout=300
    )
    assert done.returncode == 0, output.read_text()
    return project.submission()


@pytest.mark.parametrize(
    "case", ["--export=NONE", "within another array task", "a TMPDIR of the login node"]
)
def test_a_chain_does_not_depend_on_the_environment_that_submits_it(
    project: Project, reference: str, case: str
) -> None:
    if case == "--export=NONE":
        submission = project.submit("--only", "shard", 'slurm.extra=["--export=NONE"]')
    elif case == "a TMPDIR of the login node":
        gone = project.folder / "gone"
        gone.mkdir()
        submission = project.submit("--only", "shard", extra={"TMPDIR": str(gone)})
        gone.rmdir()
    else:
        submission = submit_within_a_job(project, "--only", "shard")
    assert set(submission.wait().values()) == {"COMPLETED"}
    assert project.digest() == reference


def test_the_bodies_run_alone_with_sbatch(project: Project, reference: str) -> None:
    variables = f"SITE={project.folder}/site.sh,TASKS=2"
    bodies = CHECKOUT / "slurm"
    config = ("--config", str(project.config))
    for name, options in (
        ("plan", []),
        ("shard", ["--array=0-1", "--time=10"]),
        ("gate", []),
    ):
        command = ["sbatch", "--parsable", "--wait", f"--export=ALL,{variables}", *options]
        done = subprocess.run(
            [*command, str(bodies / f"{name}.sbatch"), *config],
            cwd=project.folder,
            env=project.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        logs = "".join(path.read_text() for path in project.folder.glob("movienet-*.out"))
        assert done.returncode == 0, logs
    assert project.digest() == reference
