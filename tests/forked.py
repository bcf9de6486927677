"""Commands in real processes that start at once: forked by a server that has imported torch.

For tests of what a command does. Tests of a start, a launcher or a signal start the command itself.
"""

from __future__ import annotations

import multiprocessing
import runpy
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.sharding.servers import free_port

CHECKOUT = Path(__file__).parents[1]
BECOME = Path(__file__).with_name("become.py")
TIMEOUT_S = 500.0
"""Limit for all ranks together: longer than any command takes on a working machine, but shorter
than that of a test, which can then show the output."""

IMPORTED = (
    *("accelerate", "sklearn.linear_model", "matplotlib.figure", "matplotlib.font_manager"),
    *("configs.runtime.launch", "encoders.clip", "encoders.task", "training.loop"),
    *("eval.evaluate", "eval.render"),
)
"""What takes long to import; none of it starts a thread."""

READ_BY_IMPORTS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""Variables that libraries read when they are imported."""


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**READ_BY_IMPORTS, "PYTHONPATH": str(CHECKOUT)}.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _process(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], output: Path
) -> BaseProcess:
    what = {
        "WORDS": [*words],
        "FOLDER": str(folder),
        "ENVIRONMENT": {**READ_BY_IMPORTS, **environment},
        "OUTPUT": str(output),
    }
    return _server().Process(target=runpy.run_path, args=(str(BECOME), what, "become"))


@contextmanager
def _running(processes: Sequence[BaseProcess]) -> Iterator[None]:
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _world(rank: int, ranks: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


def _wait(processes: Sequence[BaseProcess], outputs: Path) -> None:
    """Wait for all ranks; show what they wrote if one does not end before a time limit."""
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:  # also if the time limit of pytest ends the wait
        if any(process.exitcode is None for process in processes):
            print(_written(outputs, "out"), _written(outputs, "err"), sep="\n")


def _written(outputs: Path, kind: str) -> str:
    return "".join(path.read_text() for path in sorted(outputs.glob(f"*.{kind}")))


def run(
    words: Sequence[str], *, folder: Path, environment: Mapping[str, str], ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m words…`` or a script in a folder; several ranks have torchrun's variables.

    Returns:
        The first exit code that is not 0, with the output and the errors of all ranks.
    """
    port = free_port()
    worlds = [_world(rank, ranks, port) for rank in range(ranks)] if ranks > 1 else [{}]
    return run_world(words, folder=folder, ranks=[{**environment, **world} for world in worlds])


def run_world(
    words: Sequence[str], *, folder: Path, ranks: Sequence[Mapping[str, str]]
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m words…`` or a script once per environment; return what ``run`` returns."""
    with tempfile.TemporaryDirectory() as outputs:
        processes = [
            _process(words, folder, environment, Path(outputs) / str(rank))
            for rank, environment in enumerate(ranks)
        ]
        with _running(processes):
            _wait(processes, Path(outputs))
            codes = [process.exitcode for process in processes]
        printed, errors = _written(Path(outputs), "out"), _written(Path(outputs), "err")
    failed = [code for code in codes if code != 0]
    code = (failed[0] or 1) if failed else 0
    return subprocess.CompletedProcess(words, code, printed, errors)
