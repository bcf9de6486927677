"""The chain from the mini dump to a report, and worlds of ranks, on a real Slurm."""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import Any

import pytest

from tests.slurm.cluster import Project, Submission, wait_until
from tests.slurm.conftest import copy_sets

pytestmark = pytest.mark.slurm

FOUR_RANKS = ("slurm.train.nodes=2", "slurm.train.ranks=2", "slurm.encode.ranks=2")


def report(project: Project) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(
        (project.run_dir / "report" / "val" / "report.json").read_text()
    )
    return tree


def scored(tree: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Return the genres of a report, with the scored and the trained movies of each."""
    return [(row["genre"], row["support"], row["train_support"]) for row in tree["genres"]]


@pytest.mark.parametrize("launch", ["accelerate", "srun"])
def test_one_submit_takes_the_dump_to_a_report_over_two_nodes(
    project: Project, local_run: Project, launch: str
) -> None:
    submission = project.submit(*FOUR_RANKS, f"slurm.launch={launch}")
    states = submission.wait(within_s=400)
    assert set(states.values()) == {"COMPLETED"}, submission.logs()
    assert "world 4" in submission.log("train")
    for data_set in ("frames", "features/demo"):
        assert project.digest(data_set) == local_run.digest(data_set)
    assert scored(report(project)) == scored(report(local_run))
    status = project.command("movienet-slurm", "status")
    assert status.returncode == 0, status.stdout


NET = """\
import torch

class Net(torch.nn.Module):
    def __init__(self, *, dim, genres):
        super().__init__()
        self.head = torch.nn.Linear(dim, genres)

    def forward(self, features, mask):
        real = mask.unsqueeze(-1).float()
        return self.head((features * real).sum(1) / real.sum(1))
"""


def test_a_grid_trains_and_scores_one_run_per_value_of_a_model_that_is_edited_meanwhile(
    trained_project: Project,
) -> None:
    project = trained_project
    net = project.folder / "net.py"
    net.write_text(NET)
    project.change(model={"class": "./net.py:Net", "options": {}})
    words = ("--from", "train", "--grid", "training.seed=0,1")
    scripts = project.run("movienet-slurm", "submit", *words, "--dry-run")
    assert scripts.count("#!/bin/bash") == 4
    assert not list(project.run_dir.glob("submit-*"))
    project.cluster.slurm("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        submission = project.submit(*words)
        net.write_text("raise RuntimeError('edited')\n")
    finally:
        project.cluster.slurm("scontrol", "update", "PartitionName=main", "State=UP")
    states = submission.wait(within_s=200)
    assert set(states.values()) == {"COMPLETED"}, submission.logs()
    runs = project.run_dir.parent
    assert {path.parents[2].name for path in runs.glob("*/report/*/report.json")} == {
        *("lstm-seed-0", "lstm-seed-1")
    }


def sbatch(project: Project, *lines: str, options: tuple[str, ...] = ()) -> str:
    """Run a batch script of the user's own to its end; return its output."""
    script = project.folder / "own.sbatch"
    output = project.folder / "own.out"
    head = ["#!/bin/bash", f". {project.folder}/site.sh"]
    script.write_text("\n".join([*head, *lines, ""]))
    command = ["sbatch", "--wait", f"--output={output}", "--time=4", *options, str(script)]
    subprocess.run(command, env=project.environment, cwd=project.folder, check=False, timeout=300)
    return output.read_text()


def test_tasks_of_a_step_form_a_world_without_a_launcher(trained_project: Project) -> None:
    project = trained_project
    config = f"--config {project.config}"
    train = f"srun -n 3 -N 2 movienet-train run {config} --expected-world-size 3"
    encode = (
        f"srun -n 3 -N 2 movienet-encode run {config} encoder.name=again --expected-world-size 3"
    )
    text = sbatch(project, train, encode, options=("--nodes=2", "--ntasks-per-node=2"))
    assert text.count("world 3   device cpu") == 2, text
    assert text.count("waited for data") == 3  # three ranks, each with shards of its own
    images = [int(n.replace(",", "")) for n in re.findall(r"shards, ([\d,]+) images, ", text)]
    assert sum(images) == 22947


def test_two_nodes_of_machine_rank_0_end_in_one_line(trained_project: Project) -> None:

    project = trained_project
    site = project.folder / "site.sh"
    site.write_text(f"{site.read_text()}export MACHINE_RANK=$SLURM_NODEID\n")
    submission = project.submit("--only", "train", "slurm.train.nodes=2")
    assert submission.wait(within_s=60)["train"] == "FAILED"
    status = project.command("movienet-slurm", "status").stdout
    assert "error: machine rank 0 on node 1 of 2" in status


def test_a_name_that_means_the_node_itself_does_not_keep_two_nodes_apart(
    trained_project: Project,
) -> None:
    project = trained_project
    own = "127.0.0.1 localhost\n127.0.1.1 {own}\n198.18.77.{peer} {name}\n"
    for node, peer in ((1, 2), (2, 1)):
        text = project.cluster.slurm("scontrol", "-o", "show", "node", f"tb{peer}")
        address = re.search(r"NodeAddr=(\S+)", text)
        assert address is not None
        (project.folder / f"hosts-tb{node}").write_text(
            own.format(own=f"tb{node}", peer=peer, name=f"tb{peer}").replace(
                f"198.18.77.{peer}", address[1]
            )
        )
    inside = project.folder / "inside"
    inside.write_text(
        "#!/bin/bash\nexec unshare --mount bash -c 'mount --bind "
        f'{project.folder}/hosts-$(hostname) /etc/hosts; exec "$@"\' bash "$@"\n'
    )
    inside.chmod(0o755)
    submission = project.submit(
        *("--only", "train", "slurm.train.nodes=2", "slurm.launch=srun"),
        f"slurm.prefix={inside}",
    )
    assert submission.wait(within_s=200)["train"] == "COMPLETED", submission.logs()


def test_an_unreadable_frame_shard_fails_alone_and_completes_once_it_is_mended(
    project: Project, local_run: Project
) -> None:
    copy_sets(local_run, project, "frames")
    tar = project.folder / "data" / "frames" / "frames-00003.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    submission = project.submit(
        *("--from", "encode", "slurm.encode.tasks=1", "slurm.encode.ranks=2"),
    )
    states = submission.wait(within_s=200)
    assert states["encode_0"] == "FAILED", submission.logs()
    assert states["gate-features"] == "FAILED"
    assert {states["train"], states["eval"]} == {"CANCELLED"}
    features = project.folder / "data" / "features" / "demo"
    assert len(list(features.glob("features-*.tar"))) == 19
    assert "incomplete tasks of 1: --array=0" in submission.log("gate-features")
    status = project.command("movienet-slurm", "status").stdout
    assert "1 of 10 shards failed (3)" in status
    tar.write_bytes(data)
    again = project.submit("--resubmit-missing", "slurm.encode.tasks=1", "slurm.encode.ranks=2")
    states = again.wait(within_s=300)
    assert set(states.values()) == {"COMPLETED"}, again.logs()
    assert next(iter(states)).startswith("encode")


def kill_a_rank(submission: Submission, project: Project, how: str) -> None:
    """Run a command in a step of its own, inside the nodes of the training job."""
    place = (f"--jobid={submission.ids['train']}", "--nodes=1", "--ntasks=1")
    command = ["srun", "--overlap", *place, "bash", "-c", how]
    subprocess.run(command, env=project.environment, check=False, timeout=60)


def training_steps(project: Project) -> int:
    path = project.run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum('"kind": "train"' in line for line in lines)


def test_a_killed_rank_fails_the_job_and_is_named(trained_project: Project) -> None:
    # the launcher makes the other rank report `interrupted`
    project = trained_project
    submission = project.submit(
        "--only", "train", "slurm.train.ranks=2", "training.epochs=2000", "slurm.time=5min"
    )
    wait_until(lambda: training_steps(project) > 3, within_s=120)
    pattern = "python.*training.*run|movienet-train"
    kill_a_rank(
        submission,
        project,
        f"for p in $(pgrep -f '{pattern}'); do grep -qz LOCAL_RANK=1 /proc/$p/environ && "
        "kill -9 $p; done",
    )
    assert submission.wait(within_s=120)["train"] == "FAILED", submission.logs()
    assert "rank 1 was killed by signal 9; out of memory?" in submission.log("train")
    jobs = [job for job in project.cluster.jobs() if job["JobId"] == str(submission.ids["train"])]
    assert jobs[0]["Restarts"] == "0"


@pytest.mark.skipif(
    not os.access("/sys/fs/cgroup/memory", os.W_OK), reason="no writable memory cgroup (v1) here"
)
def test_a_rank_that_a_memory_limit_ends_fails_the_job_and_is_named(
    trained_project: Project,
) -> None:
    project = trained_project
    limited = project.folder / "limited"
    group = "/sys/fs/cgroup/memory/movienet-$$"
    limited.write_text(
        "#!/bin/bash\n"
        'if [ "${SLURM_PROCID:-0}" = 1 ]; then\n'
        f"    mkdir {group} && echo 200M >{group}/memory.limit_in_bytes\n"
        f"    echo $$ >{group}/cgroup.procs\n"
        "fi\n"
        'exec "$@"\n'
    )
    limited.chmod(0o755)
    submission = project.submit(
        *("--only", "train", "slurm.train.ranks=2", "slurm.launch=srun"),
        f"slurm.prefix={limited}",
    )
    assert submission.wait(within_s=120)["train"] == "FAILED", submission.logs()
    assert "rank 1 was killed by signal 9; out of memory?" in submission.log("train")
