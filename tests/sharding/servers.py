"""Real servers on the loopback interface, each in its own process, for tests of object stores."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(command: Callable[[int], list[str]]) -> Iterator[str]:
    """Run a server on a free port until the block ends; yield its URL."""
    process, port = started(command)
    with process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def started(command: Callable[[int], list[str]]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server and wait until it listens."""
    for _ in range(5):
        port = free_port()  # if another process takes it first, the server exits: try again
        process = subprocess.Popen(
            command(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return process, port
            time.sleep(0.02)
        process.kill()
        process.wait()
    raise AssertionError(f"{command(0)} does not listen")


@contextmanager
def s3_server() -> Iterator[str]:
    """Run the S3 server of moto; yield its URL."""
    program = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"]
    with serving(lambda port: [*program, f"{port}"]) as url:
        yield url


@contextmanager
def faulty_server(upstream: str = "") -> Iterator[str]:
    """Run the server that injects faults, alone or as a proxy of ``upstream``; yield its URL."""
    program = [sys.executable, str(HERE / "faulty_server.py")]
    with serving(lambda port: [*program, f"{port}", upstream]) as url:
        yield url


@contextmanager
def nginx(folder: Path, root: Path, settings: str = "") -> Iterator[str]:
    """Serve ``root``; ``folder`` contains configuration, logs and ``sent`` (bytes per response).

    ``settings`` are further directives of the server.
    """
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    assert program is not None
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nginx.conf"
    user = "user root; " if os.geteuid() == 0 else ""  # pytest's folders are private to the user
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind}; "
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )

    def command(port: int) -> list[str]:
        config.write_text(
            f"{user}daemon off; pid {folder}/pid; error_log {folder}/error.log; "
            f"worker_processes 1;\nevents {{}}\n"
            f"http {{ log_format sent '$body_bytes_sent'; access_log {folder}/sent sent;\n"
            f"{temporary}\n"
            f"server {{ listen 127.0.0.1:{port}; root {root}; {settings} }} }}\n"
        )
        return [program, "-c", str(config), "-e", f"{folder}/error.log"]

    with serving(command) as url:
        yield url


def request(url: str, method: str = "GET", body: bytes | None = None) -> bytes:
    message = urllib.request.Request(url, data=body, method=method)  # noqa: S310  # our own servers
    with urllib.request.urlopen(message, timeout=30) as response:  # noqa: S310
        return bytes(response.read())


def rule(url: str, *rules: dict[str, Any]) -> None:
    """Replace the rules of the faulty server, each used once by default, and clear its log."""
    times = [{"times": 1} | each for each in rules]
    request(f"{url}/_rules", "PUT", json.dumps(times).encode())


def log(url: str) -> list[dict[str, str]]:
    """Return the requests to the faulty server since its rules were last set."""
    return list(json.loads(request(f"{url}/_log")))
