"""A file server like ``slow_http.py`` that injects faults at random, for the soak.

    python faulty_http.py FOLDER DELAY_MS SEED

``RATES`` are the probabilities of the faults per GET. ``GET /_faults`` returns how many requests
were answered, and how many times each fault was injected, as JSON.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import sys
import time
from collections import Counter
from http import HTTPStatus
from pathlib import Path

from slow_http import Connection, SlowServer, serve

RATES = {
    "500": 0.02,
    "503": 0.01,
    "truncated": 0.01,
    "reset": 0.01,
    "stall": 0.001,
}
"""Status 500 and 503; a body whose second half is missing, after which the connection is closed
properly or reset; and a connection without a byte for ``STALL_S``."""

STALL_S = 10.0
"""Longer than the client waits for a first byte."""

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class FaultyServer(SlowServer):
    """A server of the files in a folder that fails as often as ``RATES`` specify."""

    def __init__(self, folder: Path, delay_s: float, seed: int) -> None:
        super().__init__(folder, delay_s)
        self.RequestHandlerClass = FaultyConnection
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)

    def draw_fault(self) -> str:
        """Return the fault of the next request; empty for none."""
        with self.lock:
            drawn = fault_at(self._random.random())
            self.counts.update(["requests", drawn])
            return drawn


def fault_at(value: float) -> str:
    """Return the fault of a uniform random number below 1; empty for none."""
    for fault, rate in RATES.items():
        if value < rate:
            return fault
        value -= rate
    return ""


class FaultyConnection(Connection):
    """A connection whose requests may fail."""

    server: FaultyServer
    fault = ""

    def send(self, method: str, path: str, headers: str) -> None:
        """Respond to a request, or fail."""
        if path == "/_faults":
            self._send_counts()
            return
        self.fault = self.server.draw_fault() if method == "GET" else ""
        if self.fault == "stall":
            time.sleep(STALL_S)
            raise ConnectionAbortedError
        if self.fault in ("500", "503"):
            self.respond(HTTPStatus(int(self.fault)), 0)
            return
        super().send(method, path, headers)

    def send_body(self, handle: int, first: int, last: int) -> None:
        """Send a body, or its first half and then close the connection."""
        if self.fault not in ("truncated", "reset"):
            super().send_body(handle, first, last)
            return
        super().send_body(handle, first, (first + last) // 2)
        if self.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            self.rfile.close()
            self.connection.close()
        raise ConnectionAbortedError

    def _send_counts(self) -> None:
        counts = {name: self.server.counts[name] for name in ("requests", *RATES)}
        body = json.dumps(counts).encode()
        self.respond(HTTPStatus.OK, len(body))
        self.connection.sendall(body)


if __name__ == "__main__":
    serve(FaultyServer(Path(sys.argv[1]), float(sys.argv[2]) / 1000, int(sys.argv[3])))
