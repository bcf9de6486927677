"""A server that sends the bytes of a file as its response, whatever the request.

Usage: lying_server.py PORT FOLDER. Responses are FOLDER/answer. A response that ends with the word
ENDLESS is continued until the client closes the connection. Requests are appended to FOLDER/log.
"""

from __future__ import annotations

import contextlib
import socketserver
import sys
from pathlib import Path

FOLDER = Path(sys.argv[2])
ENDLESS = b"ENDLESS"


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        request = b""
        while (line := self.rfile.readline(65_536)) not in (b"\r\n", b""):
            request += line
        with (FOLDER / "log").open("ab") as log:
            log.write(request + b"\n")
        answer = (FOLDER / "answer").read_bytes()
        with contextlib.suppress(OSError):  # the client closes the connection
            self.wfile.write(answer.removesuffix(ENDLESS))
            while answer.endswith(ENDLESS):
                self.wfile.write(bytes(65_536))


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True


Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
