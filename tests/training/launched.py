"""Runs in real processes, as a cluster starts and stops them, and readers of their files."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.load import dump_config
from configs.runtime.launch import start
from configs.schema import Config
from tests import forked
from training import loop
from training.checkpoint import Position
from training.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 400
"""Longer than any step takes on a working machine."""

READ = ("bytes", "requests", "retries", "cache_hits")
TIMING = ("windows_per_s", "wait_share", "memory_mb", *READ)


def command(config: Config, *options: str) -> list[str]:
    """Return the command that trains this configuration."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    file = config.run_dir.with_suffix(".yaml")
    file.write_text(dump_config(config))
    return [sys.executable, "-m", "training", "run", "--config", str(file), *options]


def run_alone(config: Config, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run one rank until it exits, with ``more`` environment variables."""
    return subprocess.run(
        command(config, *options),
        cwd=ROOT,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


def environment(config: Config) -> dict[str, str]:
    """Return variables without the user's settings, with one thread per rank."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "WANDB_"))}
    return inherited | {"HF_HOME": str(config.run_dir), "OMP_NUM_THREADS": "1"}


@contextmanager
def launched(config: Config, ranks: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start ranks by ``(trap '' USR1; exec accelerate-launch …)``; one rank needs no launcher."""
    words = command(config, "--expected-world-size", str(ranks), *options)
    if ranks > 1:
        launcher = [str(Path(sys.executable).with_name("accelerate-launch"))]
        world = ["--config_file", "configs/accelerate/cpu-2.yaml", "--num_processes", str(ranks)]
        words = [*launcher, *world, *words[1:]]
    with (config.run_dir / "log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", "-c", "trap '' USR1; exec \"$@\"", "-", *words],
            cwd=ROOT,
            env=environment(config),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(config: Config, ranks: int, *options: str) -> str:
    """Run to the end; return the log."""
    with launched(config, ranks, *options) as process:
        code = process.wait(timeout=TIMEOUT_S)
    log = (config.run_dir / "log").read_text()
    assert code == 0, log
    return log


def finish_forked(config: Config, ranks: int) -> str:
    """Run to the end in ranks that start at once, without a launcher; return their log."""
    words = command(config, "--expected-world-size", str(ranks))[2:]
    done = forked.run(words, folder=ROOT, environment=environment(config), ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done.stderr


def wait_until(true: Callable[[], bool], config: Config) -> None:
    """Wait for a condition; on a timeout, show the log of the run."""
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, (config.run_dir / "log").read_text()
        time.sleep(0.01)


def wait_for_step(config: Config, step: int) -> None:
    """Wait until this step is in the metrics file."""
    wait_until(lambda: last_step(config) >= step, config)


def last_step(config: Config) -> int:
    """Return the newest step in the metrics file; 0 before the first."""
    return max((record["step"] for record in history(config)), default=0)


def workers(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the process ids of a launcher's ranks, in order; without a launcher, its own id."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [pid for pid in children if b"training" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return [int(pid) for pid in ranks] or [process.pid]


def send(number: signal.Signals, *pids: int) -> None:
    """Send a signal to those of these processes that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def weights(config: Config, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(config.run_dir / "checkpoints" / which / "model.safetensors")


def same(first: Config, second: Config) -> None:
    """Assert that two runs have bitwise equal weights, moments and metrics."""
    for name in ("model", "optimizer"):
        one, two = (
            load_file(config.run_dir / f"checkpoints/last/{name}.safetensors")
            for config in (first, second)
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert history(first) == history(second)


def history(config: Config) -> list[dict[str, Any]]:
    """Return the metrics without those that depend on the speed of this machine."""
    records = read_metrics(config.run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMING} for record in records]


def curve(config: Config) -> list[float]:
    return [record["loss"] for record in history(config) if record["kind"] == "train"]


def attempt(config: Config, number: int) -> tuple[str, int | None]:
    record = json.loads((config.run_dir / f"attempt-{number}.json").read_text())
    return record["outcome"], record["step"]


def train(config: Config) -> Position:
    training = config.training
    distributed = start(
        device="cpu",
        precision=training.precision,
        accumulation=training.grad_accumulation,
        expected_world_size=1,
        threads=1,
        compiled=training.compile,
    )
    try:
        return loop.train(config, distributed)
    finally:
        distributed.close()


def train_logged(config: Config) -> str:
    """Train and return the log."""
    logger, log = logging.getLogger("training"), io.StringIO()
    handler = logging.StreamHandler(log)
    logger.addHandler(handler)
    train(config)
    logger.removeHandler(handler)
    return log.getvalue()


@contextmanager
def at_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Call ``act`` once, at the start of the optimizer step after ``step`` completed ones."""
    original = loop.optimizer_step

    def wrapped(run: Any, batches: Any) -> dict[str, float]:
        if run.position.step == step:
            act()
        return original(run, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimizer_step", wrapped)
        yield
