"""The doctor on a real Slurm, with faults planted in its site."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Project, wait_until
from tests.slurm.conftest import MakeProject

pytestmark = pytest.mark.slurm

TWO_NODES = "slurm.train.nodes=2"


def prefix(folder: Path, *commands: str) -> str:
    """Write a program that runs another one in a mount namespace of its own, as a container."""
    path = folder / "inside"
    inner = "; ".join([*commands, 'exec "$@"'])
    path.write_text(f"#!/bin/bash\nexec unshare --mount bash -c '{inner}' bash \"$@\"\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return f"slurm.prefix={path}"


def rows(text: str) -> dict[str, str]:
    """Return the rows by check, with their level."""
    found = {}
    for line in text.splitlines():
        level, _, rest = line.partition("   ")
        found[rest.split("   ")[0].strip()] = f"{level.strip()}: {rest.split('   ', 1)[-1].strip()}"
    return found


def test_a_site_without_faults_passes_on_two_nodes(project: Project) -> None:
    done = project.command("movienet-slurm", "doctor", TWO_NODES)
    assert done.returncode == 0, done.stdout
    found = rows(done.stdout)
    assert found["all-reduce gloo"].startswith("ok: 2 nodes")
    assert found["scontrol in jobs"] == "ok: answers"
    assert {check for check in found if check.endswith("torch")} == {"tb1 torch", "tb2 torch"}


def test_the_doctor_finds_a_name_that_means_the_node_itself_missing_weights_and_no_internet(
    project: Project,
) -> None:
    hosts = project.folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 tb1 tb2 tb3\n")
    done = project.command(
        *("movienet-slurm", "doctor", TWO_NODES, "tracking.wandb=auto"),
        prefix(project.folder, f"mount --bind {hosts} /etc/hosts"),
        *("encoder.model=ViT-B-32-quickgelu", "encoder.pretrained=openai"),
        f"encoder.weights_dir={project.folder}",
    )
    found = rows(done.stdout)
    assert done.returncode == 1
    assert found["tb1 own name"].startswith("fail: means 127.0.1.1; set GLOO_SOCKET_IFNAME")
    assert found["weights"].startswith("fail: ViT-B-32-quickgelu openai is not on this node")
    assert "movienet-encode fetch" in found["weights"]
    import wandb

    server = wandb.Settings().base_url  # the default differs between versions of wandb
    assert found["wandb"].startswith(f"warn: {server} is not reachable")
    assert "movienet-train sync" in found["wandb"]


def test_the_doctor_finds_a_read_only_root_a_full_disk_a_broken_torch_and_no_scontrol(
    make_project: MakeProject, tmp_path: Path
) -> None:
    broken, bare, scratch = (tmp_path / name for name in ("broken", "bare", "scratch"))
    for folder in (broken, bare, scratch):
        folder.mkdir()
    (broken / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open')\n")
    for program in Path("/usr/bin").iterdir():
        if program.name != "scontrol":
            (bare / program.name).symlink_to(program)
    project = make_project(
        f"export PATH=${{PATH%%:*}}:{Path(sys.executable).parent}:{bare}",
        f"export PYTHONPATH={broken}:${{PYTHONPATH:-}} SLURM_TMPDIR={scratch}",
    )
    root = project.folder / "data"
    root.mkdir()
    done = project.command(
        *("movienet-slurm", "doctor"),
        prefix(
            project.folder,
            f"mount --bind {root} {root}",
            f"mount -o remount,ro,bind {root}",
            f"mount --bind {root}/runs {root}/runs",
            f"mount -o remount,rw,bind {root}/runs",
            f"mount -t tmpfs -o size=64k tmpfs {scratch}",
        ),
    )
    found = rows(done.stdout)
    assert done.returncode == 1
    assert "Read-only file system" in found["tb1 root"]
    assert found["tb1 scratch space"].startswith("fail: ") or found["tb1 scratch"].startswith(
        "fail: "
    )
    assert found["tb1 torch"].startswith("fail: does not import: ImportError: libcudart.so.12")
    assert found["scontrol in jobs"].startswith("fail: not found")


def test_the_doctor_finds_a_node_that_is_cut_off(project: Project, cluster: Cluster) -> None:
    cluster.call("cut", "tb2")
    try:
        wait_until(lambda: "down" in cluster.slurm("sinfo", "-hn", "tb2", "-o", "%T"))
        done = project.command("movienet-slurm", "doctor", "--patience=60s", TWO_NODES)
    finally:
        cluster.call("revive", "tb2")
    assert "tb2 is down* (Not responding" in rows(done.stdout)["nodes"]
    assert "slurm.exclude: tb2" in rows(done.stdout)["nodes"]
    assert rows(done.stdout)["all-reduce gloo"].startswith("ok: 2 nodes")  # tb1 and tb3


def test_a_machine_with_slurm_s_programs_that_belongs_to_no_cluster_is_named(
    project: Project, tmp_path: Path
) -> None:
    conf = tmp_path / "slurm.conf"
    conf.touch()
    done = project.command("movienet-slurm", "submit", "--dry-run", extra={"SLURM_CONF": str(conf)})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "error: scontrol: finds no configuration of Slurm; run this on a login node of the "
        "cluster, or set SLURM_CONF to its slurm.conf ("
    )


def test_submit_refuses_what_the_cheap_half_finds(project: Project) -> None:
    done = project.command("movienet-slurm", "submit", "slurm.train.partition=gpu")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: slurm.train.partition: no partition 'gpu'; partitions: main, urgent"
    )
    long = project.command("movienet-slurm", "submit", "slurm.train.time=2h")
    assert "slurm.train.time: got 02:00:00, partition main allows 1:00:00" in long.stderr
    assert not list(project.run_dir.glob("submit-*"))
