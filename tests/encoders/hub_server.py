"""Server of one file of one repository in the format of the Hugging Face hub.

    python hub_server.py PORT

``GET /_log`` returns the requested paths.
"""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATH = "/timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors"
CONTENT = b"weights" * 1000
LOG: list[str] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/_log":
            self.answer(200, json.dumps(LOG).encode())
            return
        LOG.append(self.path)
        if self.path == PATH:
            self.answer(200, CONTENT)
        else:
            self.answer(404, b"")

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
