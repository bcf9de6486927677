"""A file server with a delay before the first byte of each answer, for benchmarks.

    python slow_http.py FOLDER DELAY_MS

It prints its URL, and ends when its standard input is closed, as by the end of its parent. It
supports ranges, HEAD and keep-alive, with one thread per connection. The kernel copies a body from
the file to the socket, so that the server uses little of the CPU it shares with the client.
``GET /_sent`` returns the number of body bytes sent so far, including those of aborted requests.
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
    """A server of the files in a folder."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 256

    def __init__(self, folder: Path, delay_s: float) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.delay_s, self.sent = delay_s, 0
        self.lock = threading.Lock()
        self.files = {f"/{path.name}": os.open(path, os.O_RDONLY) for path in folder.iterdir()}

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients may disconnect at any time."""


class Connection(StreamRequestHandler):
    """A connection, which may carry several requests."""

    server: SlowServer
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Respond to requests until the client disconnects."""
        while line := self.rfile.readline():
            method, path, _ = line.decode("latin-1").split()
            headers = b"".join(iter(self.rfile.readline, b"\r\n")).decode("latin-1")
            if path == "/_sent":
                self.respond(HTTPStatus.OK, len(body := b"%d" % self.server.sent))
                self.connection.sendall(body)
            else:
                time.sleep(self.server.delay_s)
                self.send(method, path, headers)

    def send(self, method: str, path: str, headers: str) -> None:
        """Respond to one request for a file."""
        handle = self.server.files.get(path)
        if handle is None:
            self.respond(HTTPStatus.NOT_FOUND, 0)
            return
        size = os.fstat(handle).st_size
        first, last, status, content_range = 0, size - 1, HTTPStatus.OK, ""
        if match := re.search(r"(?im)^range: bytes=(\d+)-(\d+)\r?$", headers):
            first, last = int(match[1]), min(int(match[2]), size - 1)
            status, content_range = HTTPStatus.PARTIAL_CONTENT, f"bytes {first}-{last}/{size}"
        self.respond(status, last - first + 1, content_range)
        if method == "GET":
            self.send_body(handle, first, last)

    def send_body(self, handle: int, first: int, last: int) -> None:
        """Copy bytes ``first`` to ``last`` of a file to the client."""
        at = first
        try:
            while at <= last:
                at += os.sendfile(self.connection.fileno(), handle, at, last + 1 - at)
        finally:
            with self.server.lock:
                self.server.sent += at - first

    def respond(self, status: HTTPStatus, length: int, content_range: str = "") -> None:
        """Send the head of a response."""
        extra = f"Content-Range: {content_range}\r\n" if content_range else ""
        head = f"HTTP/1.1 {status} {status.phrase}\r\nContent-Length: {length}\r\n{extra}"
        self.connection.sendall(f'{head}ETag: "1"\r\n\r\n'.encode("latin-1"))


def serve(server: SlowServer) -> None:
    """Print the URL of a server and run it until standard input is closed."""
    with server:
        sys.stdout.write(f"http://127.0.0.1:{server.server_address[1]}\n")
        sys.stdout.flush()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.read()


if __name__ == "__main__":
    serve(SlowServer(Path(sys.argv[1]), float(sys.argv[2]) / 1000))
