"""Two ranks, started as in a Slurm step and interrupted in four ways, make the same bytes.

Real processes and real signals. Each interruption waits until the ranks have published something.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from configs.runtime.attempt import last_attempt, task_dir
from configs.schema import Config
from encoders.task import run_task
from tests import forked
from tests.encoders.conftest import Configure, build_frames, jpeg

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # five starts of torch, twice each

REPOSITORY = Path(__file__).parents[2]
MOVIES = 45
PATIENCE_S = 240.0


TOWER = """
import torch
from encoders.decode import Preprocessing


class Slow(torch.nn.Module):
    dim = 16
    preprocessing = Preprocessing(16, 16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def __init__(self, *, seed):
        super().__init__()
        shuffled = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(torch.randn(768, 1536, generator=shuffled) / 28)
        self.second = torch.nn.Parameter(torch.randn(1536, 1536, generator=shuffled) / 28)

    def encode(self, frames):
        x = (frames.flatten(1).float() / 255 - 0.5) @ self.first
        for _ in range(30):
            x = x + 0.1 * torch.tanh(x @ self.second)
        return x[:, :16]
"""
"""A custom encoder: without the import of open_clip a rank starts twice as fast."""

OPTIONS = ("sharding.shard_bytes=1", "encoder.model=./tower.py:Slow", "encoder.batch_size=3")


@pytest.fixture
def slow_set(configure: Configure, tmp_path: Path) -> Callable[[str], Config]:
    """One movie of two batches per shard, and a tower that takes a tenth of a second for it."""
    movies = [f"tt{number:07d}" for number in range(MOVIES)]
    for number, movie in enumerate(movies):
        (tmp_path / "dump" / movie).mkdir(parents=True)
        for image in range(6):
            name = f"shot_{image // 3:04d}_img_{image % 3}.jpg"
            (tmp_path / "dump" / movie / name).write_bytes(jpeg(64, 48, 10 * number + image))
    (tmp_path / "meta.json").write_text(json.dumps({movie: ["Drama"] for movie in movies}))
    (tmp_path / "split.json").write_text(json.dumps({"train": movies, "val": [], "test": []}))
    (tmp_path / "tower.py").write_text(TOWER)
    build_frames(configure(*OPTIONS))
    return lambda name: configure(*OPTIONS, f"encoder.name={name}")


OWN = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


def arguments(config: Config, folder: Path) -> list[str]:
    name = f"encoder.name={config.encoder.name}"
    return ["encoders", "run", "--config", str(folder / "config.yaml"), *OPTIONS, name]


@contextmanager
def step(config: Config, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``accelerate-launch`` of two ranks, in a shell that ignores USR1 as in sbatch scripts."""
    launcher = Path(sys.executable).with_name("accelerate-launch")
    command = [
        str(launcher),
        *("--config_file", str(REPOSITORY / "configs" / "accelerate" / "cpu-2.yaml")),
        *("-m", *arguments(config, folder)),
    ]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", "-c", "trap '' USR1; exec \"$@\"", "-", *command],
            env=os.environ | OWN,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        for pid in (process.pid, *descendants(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process; launchers start ranks in separate sessions."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(stat.parent.name))
    family = [pid]
    for each in family:
        family += parents.get(each, [])
    return family[1:]


def to_all(number: signal.Signals) -> Callable[[int, list[int]], None]:
    def send(launcher: int, ranks: list[int]) -> None:
        for pid in (launcher, *ranks):
            os.kill(pid, number)

    return send


def terminate(launcher: int, _ranks: list[int]) -> None:
    os.kill(launcher, signal.SIGTERM)


def kill_one(_launcher: int, ranks: list[int]) -> None:
    os.kill(ranks[0], signal.SIGKILL)


INTERRUPTIONS = {
    "USR1 to every process": (to_all(signal.SIGUSR1), "interrupted"),
    "TERM to the launcher": (terminate, "interrupted"),
    "KILL to one rank": (kill_one, "interrupted"),
    "KILL to all": (to_all(signal.SIGKILL), "running"),
}
"""Interruption, and the recorded outcome of the attempt."""


def published(config: Config) -> int:
    return len(list(Path(config.features_dir).glob("features-*.json")))


def contents(config: Config) -> dict[str, bytes]:
    names = ("*.tar", "*.npz", "manifest.json", "plan.json")
    return {
        path.name: path.read_bytes()
        for name in names
        for path in sorted(Path(config.features_dir).glob(name))
    }


def test_two_ranks_interrupted_in_each_way_make_the_bytes_of_an_uninterrupted_rank(
    slow_set: Callable[[str], Config], tmp_path: Path
) -> None:
    calm, config = slow_set("calm"), slow_set("interrupted")
    run_task(calm)
    chance = random.Random(0)
    kinds = chance.sample([*INTERRUPTIONS], len(INTERRUPTIONS))
    for kind in kinds:
        interrupt, outcome = INTERRUPTIONS[kind]
        n_shards = published(config) + chance.randint(1, 3)
        with step(config, tmp_path) as process:
            wait_for(n_shards, config, process, tmp_path)
            ranks = descendants(process.pid)
            chance.shuffle(ranks)
            interrupt(process.pid, ranks)
            assert process.wait(timeout=PATIENCE_S) != 0
        attempt = last_attempt(task_dir(config, "encode", (0, 1)))
        assert attempt is not None
        log = (tmp_path / "log").read_text()
        assert published(config) < MOVIES, (
            "the set is too small: it was complete before the interruption"
        )
        assert (kind, attempt.outcome) == (kind, outcome), log
    done = forked.run(
        arguments(config, tmp_path), folder=tmp_path, environment=os.environ | OWN, ranks=2
    )
    assert done.returncode == 0, done.stderr
    attempt = last_attempt(task_dir(config, "encode", (0, 1)))
    assert attempt is not None
    assert (attempt.attempt, attempt.outcome, attempt.step) == (len(kinds) + 1, "done", 6 * MOVIES)
    assert contents(config) == contents(calm)


def wait_for(shards: int, config: Config, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while published(config) < shards:
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.005)
