"""Real servers on the loopback, each a process of its own, for the tests of object stores."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(command: list[str], port: int) -> Iterator[str]:
    """Run a server until the block ends; give its URL."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's S3."""
    port = free_port()
    with serving(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", f"{port}"], port
    ) as url:
        yield url


@contextmanager
def faulty_server() -> Iterator[str]:
    """Run the server that answers wrongly on request."""
    port = free_port()
    with serving([sys.executable, str(HERE / "faulty_server.py"), f"{port}"], port) as url:
        yield url


@contextmanager
def nginx(folder: Path, root: Path) -> Iterator[str]:
    """Serve ``root``; ``folder`` holds the configuration and the logs."""
    port, program = free_port(), shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    assert program is not None
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nginx.conf"
    user = "user root; " if os.geteuid() == 0 else ""  # pytest's folders are closed to others
    spots = "".join(
        f"{kind}_temp_path {folder}/{kind}; "
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"{user}daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;\n"
        f"events {{}}\nhttp {{ access_log off; {spots}\n"
        f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    with serving([program, "-c", str(config), "-e", f"{folder}/error.log"], port) as url:
        yield url


def request(url: str, method: str = "GET", body: bytes | None = None) -> bytes:
    asked = urllib.request.Request(url, data=body, method=method)  # noqa: S310  # our own servers
    with urllib.request.urlopen(asked, timeout=30) as answer:  # noqa: S310
        return bytes(answer.read())


def rule(url: str, *rules: dict[str, Any]) -> None:
    """Tell the faulty server what to do next, and forget its log."""
    times = [{"times": 1} | each for each in rules]
    request(f"{url}/_rules", "PUT", json.dumps(times).encode())


def log(url: str) -> list[dict[str, str]]:
    """Return what the faulty server was asked since the last rule."""
    return list(json.loads(request(f"{url}/_log")))
