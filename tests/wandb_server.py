"""A real server for wandb on this machine: openwandb, installed in a folder of its own."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_KEY = "local" + "0" * 40
"""Key of the server's first user."""


@dataclass(frozen=True)
class WandbServer:
    """A running server."""

    url: str
    data: Path
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which wandb uses this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": _KEY}

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Return rows of the server's database: what it has stored."""
        with closing(sqlite3.connect(self.data / "openwandb.db", timeout=60)) as database:
            return database.execute(sql).fetchall()


@contextmanager
def wandb_server(data: Path) -> Iterator[WandbServer]:
    """Run a server that stores in ``data``; skip the test where pip cannot install one."""
    packages = _installed()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    data.mkdir(parents=True)
    words = ["serve", "--host", "127.0.0.1", "-p", str(port), "--data-dir", str(data)]
    with (data / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "openwandb", *words],
            cwd=data,
            env=os.environ | {"PYTHONPATH": str(packages)},
            stdout=log,
            stderr=log,
        )
    try:
        while not _accepts(port):
            assert process.poll() is None, (data / "log").read_text()
            time.sleep(0.1)
        yield WandbServer(f"http://127.0.0.1:{port}", data, process.pid)
    finally:
        process.kill()
        process.wait()


def _accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _installed() -> Path:
    """Return a folder with openwandb, which later sessions find again."""
    folder = Path(tempfile.gettempdir()) / f"openwandb-for-tests-{os.geteuid()}"
    if not folder.is_dir():
        new = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(new), "openwandb"]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip cannot install openwandb: {done.stderr.strip().splitlines()[-1:]}")
        with suppress(OSError):  # a concurrent session was first
            new.rename(folder)
    return folder
