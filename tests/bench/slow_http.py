"""A file server with a delay before the first byte of each answer, for benchmarks.

    python slow_http.py FOLDER DELAY_MS

It prints its URL, and ends when its input does: with whoever started it. One thread a connection,
ranges, HEAD and keep-alive; a body goes from the file to the socket within the kernel, so that the
server takes little of the machine it shares with the client. ``GET /_sent`` tells how many bytes of
bodies it has sent, those that a client no longer wanted included.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from http import HTTPStatus
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer


class SlowServer(ThreadingTCPServer):
    """Serves a folder."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, delay_s: float) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.delay_s, self.sent = delay_s, 0
        self.lock = threading.Lock()
        self.files = {f"/{path.name}": os.open(path, os.O_RDONLY) for path in folder.iterdir()}

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients hang up."""


class Connection(StreamRequestHandler):
    """Answers one request after another."""

    server: SlowServer
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Answer until the client hangs up."""
        while line := self.rfile.readline():
            method, path, _ = line.decode("latin-1").split()
            headers = b"".join(iter(self.rfile.readline, b"\r\n")).decode("latin-1")
            if path == "/_sent":
                self._answer(HTTPStatus.OK, len(body := b"%d" % self.server.sent))
                self.connection.sendall(body)
            else:
                time.sleep(self.server.delay_s)
                self._send(method, path, headers)

    def _send(self, method: str, path: str, headers: str) -> None:
        handle = self.server.files.get(path)
        if handle is None:
            self._answer(HTTPStatus.NOT_FOUND, 0)
            return
        size = os.fstat(handle).st_size
        first, last, status, place = 0, size - 1, HTTPStatus.OK, ""
        if wanted := re.search(r"(?im)^range: bytes=(\d+)-(\d+)\r?$", headers):
            first, last = int(wanted[1]), min(int(wanted[2]), size - 1)
            status, place = HTTPStatus.PARTIAL_CONTENT, f"bytes {first}-{last}/{size}"
        self._answer(status, last - first + 1, place)
        at = first
        try:
            while method == "GET" and at <= last:
                at += os.sendfile(self.connection.fileno(), handle, at, last + 1 - at)
        finally:
            with self.server.lock:
                self.server.sent += at - first

    def _answer(self, status: HTTPStatus, length: int, place: str = "") -> None:
        told = f"Content-Range: {place}\r\n" if place else ""
        head = f"HTTP/1.1 {status} {status.phrase}\r\nContent-Length: {length}\r\n{told}"
        self.connection.sendall(f'{head}ETag: "1"\r\n\r\n'.encode("latin-1"))


if __name__ == "__main__":
    with SlowServer(Path(sys.argv[1]), float(sys.argv[2]) / 1000) as server:
        sys.stdout.write(f"http://127.0.0.1:{server.server_address[1]}\n")
        sys.stdout.flush()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.read()
