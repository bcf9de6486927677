"""A cluster per worker of pytest for the tests marked ``slurm``, and a fresh project for each."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from tests import forked
from tests.made_once import made_once
from tests.slurm.cluster import (
    CHECKOUT,
    TESTBED,
    Cluster,
    Project,
    site_file,
    write_programs,
)

MAX_ARRAY_SIZE = 11


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("the Slurm testbed needs root")
    if not TESTBED.is_file():
        pytest.skip(f"no Slurm testbed at {TESTBED}")
    if shutil.which("slurmctld") is None and not Path("/usr/sbin/slurmctld").exists():
        pytest.skip("Slurm is not installed: run `testbed install`")
    folder = Path(tempfile.mkdtemp(prefix="tb"))  # short, unix sockets are made in it
    # Grace and kill wait are upper bounds: a busy machine needs longer to save than an idle one.
    limits = ["--max-array", str(MAX_ARRAY_SIZE), "--grace", "120", "--kill-wait", "20"]
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = ["--subnet", f"198.18.{77 + 20 * number}", "--port", str(17817 + 20 * number)]
    up = [str(TESTBED), "up", "--dir", str(folder), *limits, *own]
    done = subprocess.run(up, check=True, text=True, stdout=subprocess.PIPE, timeout=120)
    try:
        yield Cluster(folder, done.stdout.strip().split("=", 1)[1])
    finally:
        down = [str(TESTBED), "down", "--purge", "--dir", str(folder)]
        subprocess.run(down, check=True, timeout=120)


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    yield running_cluster
    running_cluster.clean()


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our console scripts."""
    folder = tmp_path_factory.mktemp("bin")
    write_programs(folder)
    return folder


@pytest.fixture(scope="session")
def mini_dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini dump. Tests only read it."""
    with made_once(tmp_path_factory, "slurm-dump") as (folder, missing):
        if missing:
            folder.mkdir()
            done = forked.run(
                ["sharding", "demo", "--config", "demo", f"data.dump={folder}/240P"],
                folder=folder,
                environment={"PATH": os.environ["PATH"], "HOME": str(folder)},
            )
            assert done.returncode == 0, done.stderr
    return folder


def new_project(
    cluster: Cluster, installed: Path, mini_dump: Path, folder: Path, site: Sequence[str] = ()
) -> Project:
    """Write a configuration and a site file into a folder."""
    folder.mkdir()
    tree = yaml.safe_load((CHECKOUT / "configs" / "demo.yaml").read_text())
    tree["data"] = {
        "dump": str(mini_dump / "240P"),
        "metadata": str(mini_dump / "meta"),
        "split": str(mini_dump / "split.json"),
        "root": "data",
    }
    tree["encoder"]["model"] = str(CHECKOUT / "configs" / "towers" / "demo.json")
    tree["training"] |= {"run_name": "lstm", "epochs": 4}
    tree["eval"]["bootstrap"] = 10
    tree["tracking"] = {"wandb": "off"}
    tree["slurm"] = {
        "site": str(site_file(folder, installed, site)),
        "time": "20min",
        "lead": "20s",
        "shard": {"tasks": 4},
        "encode": {"tasks": 2},
    }
    (folder / "films.yaml").write_text(yaml.safe_dump(tree))
    environment = {
        "PATH": f"{installed}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(CHECKOUT),
        "SLURM_CONF": cluster.conf,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Project(cluster, folder, environment)


MakeProject = Callable[..., Project]


@pytest.fixture
def make_project(cluster: Cluster, installed: Path, mini_dump: Path, tmp_path: Path) -> MakeProject:
    """A function that makes a project; its arguments are further lines of the site file."""

    def make(*site: str) -> Project:
        return new_project(cluster, installed, mini_dump, tmp_path / "films", site)

    return make


@pytest.fixture(scope="session")
def local_run(
    running_cluster: Cluster,
    installed: Path,
    mini_dump: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Project:
    """A project that was taken from the dump to a report on this machine, without Slurm."""
    with made_once(tmp_path_factory, "slurm-local") as (folder, missing):
        if not missing:
            return Project(running_cluster, folder, {})
        project = new_project(running_cluster, installed, mini_dump, folder)
        for program, command in (
            ("movienet-shard", "build"),
            ("movienet-encode", "run"),
            ("movienet-train", "run"),
            ("movienet-eval", "report"),
        ):
            project.run_forked(program, command)
    return project


@pytest.fixture
def trained_project(make_project: MakeProject, local_run: Project) -> Project:
    """A project whose features are there already."""
    project = make_project()
    copy_sets(local_run, project, "frames", "features")
    return project


def copy_sets(local_run: Project, project: Project, *names: str) -> None:
    """Give a project the sets that its own commands would make."""
    for name in names:
        shutil.copytree(local_run.folder / "data" / name, project.folder / "data" / name)


@pytest.fixture
def project(make_project: MakeProject) -> Project:
    return make_project()


@pytest.fixture
def slow_project(make_project: MakeProject) -> Project:
    """A project on a disk so slow that its frame shards take about a second each."""
    project = make_slow(make_project, 0.05, "/240P/")
    project.run("movienet-shard", "plan")
    return project


def make_slow(make_project: MakeProject, open_s: float, folder: str) -> Project:
    """Make a project whose jobs need a while to open each file below a folder."""
    slow = Path(__file__).parent / "slow_disk"
    disk = f"SLOW_OPEN_S={open_s} SLOW_FOLDER={folder}"
    return make_project(f"export PYTHONPATH={slow}:${{PYTHONPATH:-}} {disk}")
