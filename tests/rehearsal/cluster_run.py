"""The disturbed chain through Slurm: a node loses power, and encoding is preempted twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.rehearsal.plain_run import PREEMPT_AT
from tests.rehearsal.work import Work, restarts
from tests.slurm.cluster import TESTBED, Cluster, Project, Submission, wait_until

PATIENCE_S = 600.0


def has_slurm() -> bool:
    """Return whether a cluster can be started on this machine."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    return os.geteuid() == 0 and TESTBED.is_file() and bool(shutil.which("slurmctld", path=path))


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Run a cluster of three nodes with two CPUs each."""
    folder = Path(tempfile.mkdtemp(prefix="tb"))  # short, unix sockets are made in it
    nodes = ["--nodes", "3", "--cpus", "2", "--grace", "120", "--min-job-age", "7200"]
    own = ["--subnet", "198.18.137", "--port", "17917"]
    up = [str(TESTBED), "up", "--dir", str(folder), *nodes, *own]
    done = subprocess.run(up, check=True, text=True, stdout=subprocess.PIPE)
    try:
        yield Cluster(folder, done.stdout.strip().split("=", 1)[1])
    finally:
        subprocess.run([str(TESTBED), "down", "--purge", "--dir", str(folder)], check=True)


def run_chain(work: Work) -> None:
    """Submit the chain and disturb it; completed stages are skipped."""
    with cluster() as slurm:
        environment = work.environment() | {"SLURM_CONF": slurm.conf}
        project = Project(slurm, work.folder, environment)
        submission = project.submit()
        if not work.is_sealed("frames"):
            _lose_a_node(work, submission)
        if not work.is_sealed("features/demo"):
            for number, share in enumerate(PREEMPT_AT, start=1):
                _preempt(work, submission, number, share)
        states = submission.wait(within_s=PATIENCE_S)
        if set(states.values()) != {"COMPLETED"}:
            raise SystemExit(f"{states}\n{submission.logs()}")


def _lose_a_node(work: Work, submission: Submission) -> None:
    """Switch a node off on which tasks build shards."""
    node = _wait_for_node(work, submission, "shard", "frames", 0.1)
    if node is None:
        return
    submission.cluster.call("kill-node", node)
    submission.wait_for("gate-frames", "COMPLETED", within_s=PATIENCE_S)
    submission.cluster.call("revive", node)


def _preempt(work: Work, submission: Submission, number: int, share: float) -> None:
    """Run an urgent job on the node that encodes, for the ``number``-th time."""

    def ended() -> bool:
        return restarts(work.attempts("encode"))[0] >= number

    node = _wait_for_node(work, submission, "encode", "features/demo", share)
    if node is None:
        return
    options = ["--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null"]
    command = ["sbatch", *options, "--wrap=sleep 1"]
    environment = work.environment() | {"SLURM_CONF": submission.cluster.conf}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    wait_until(ended, within_s=PATIENCE_S, what="a preempted life")


def _wait_for_node(
    work: Work, submission: Submission, name: str, data_set: str, share: float
) -> str | None:
    """Return a node of a job once it has made a share of a data set; None if that is complete."""

    def look() -> tuple[str | None] | None:
        if work.is_sealed(data_set):
            return (None,)
        node = _node_of(submission, name)
        return (node,) if node and work.progress(data_set) >= share else None

    (node,) = wait_until(look, within_s=PATIENCE_S, what=f"{share:.0%} of {data_set}")
    return node


def _node_of(submission: Submission, name: str) -> str | None:
    """Return the node of a job's first running task; None if none runs."""
    mine = str(submission.ids[name])
    jobs = [job for job in submission.cluster.jobs() if job["JobState"] == "RUNNING"]
    nodes = (j["NodeList"] for j in jobs if mine in (j["JobId"], j.get("ArrayJobId")))
    return next(nodes, None)
