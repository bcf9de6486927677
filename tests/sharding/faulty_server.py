"""A small S3-like HTTP server that injects faults on request; it runs in its own process.

    python faulty_server.py PORT [UPSTREAM]

With the URL of another server it is a proxy, and distorts the responses of that server.

``PUT /_rules`` sets the rules: ``[{"do": …, "times": N, "method": …, "path": …}, …]``. The first
rule that matches the method, and substrings of the path, of the range and (``key``) of the
Authorization header, is applied, N times at most. ``GET /_log`` returns the requests since then.
All other paths are ``/BUCKET/KEY``.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

FILES: dict[str, bytes] = {}
PARTS: dict[str, dict[int, bytes]] = {}
RULES: list[dict[str, Any]] = []
LOG: list[dict[str, str]] = []
LOCK = threading.Condition()
"""Held while rules are read or replaced; notified when they are replaced."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    slow = 0.0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/_log":
            self.answer(200, json.dumps(LOG).encode())
            return
        rule = self.rule()
        if rule.get("do") == "stall":
            self.stall(rule)
            return
        if rule.get("do") == "refuse":
            self.refuse(rule)
            return
        self.slow = rule["seconds"] if rule.get("do") == "slow" else 0.0
        if UPSTREAM:
            self.forward(rule)
            return
        url = urlsplit(self.path)
        if "list-type" in url.query:
            self.list(parse_qs(url.query).get("prefix", [""])[0])
            return
        data = FILES.get(url.path)
        if data is None:
            self.refuse({"status": 404, "code": "NoSuchKey"})
            return
        self.send(data, rule)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/_rules":
            with LOCK:
                RULES[:] = json.loads(body)
                LOG.clear()
                LOCK.notify_all()
            self.answer(200, b"")
            return
        rule = self.rule()
        create = "If-None-Match" in self.headers and rule.get("do") != "overwrite"
        query = parse_qs(urlsplit(self.path).query)
        if rule.get("do") == "stall":
            self.stall(rule)
        elif rule.get("do") == "refuse":
            self.refuse(rule)
        elif "partNumber" in query:
            PARTS[query["uploadId"][0]][int(query["partNumber"][0])] = body
            self.answer(200, b"", {"ETag": tag(body)})
        elif create and self.path in FILES:
            self.refuse({"status": 412, "code": "PreconditionFailed"})
        else:
            FILES[self.path] = body
            if rule.get("do") == "forget":  # written, but the client gets an error
                self.refuse({"status": 500, "code": "InternalError"})
            else:
                self.answer(200, b"", {"ETag": tag(body)})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        if "uploads" in query:
            upload = f"upload{len(PARTS)}"
            PARTS[upload] = {}
            kind, content = "InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>"
        elif "uploadId" in query:
            parts = PARTS[query["uploadId"][0]]
            FILES[url.path] = b"".join(parts[number] for number in sorted(parts))
            kind = "CompleteMultipartUploadResult"
            content = f"<ETag>{tag(FILES[url.path])}</ETag>"
        else:
            keys = re.findall(r"<Key>(.*?)</Key>", body)
            for key in keys:
                FILES.pop(f"{url.path.rstrip('/')}/{key}", None)
            kind = "DeleteResult"
            content = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self.answer(200, f"<{kind}>{content}</{kind}>".encode())

    def do_DELETE(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        PARTS.pop(query.get("uploadId", [""])[0], None)
        FILES.pop(self.path, None)
        self.answer(204, b"")

    def rule(self) -> dict[str, Any]:
        with LOCK:
            signed = self.headers.get("Authorization", "")
            LOG.append(
                {
                    "method": self.command,
                    "path": self.path,
                    "signed": signed,
                    "range": self.headers.get("Range", ""),
                }
            )
            for rule in RULES:
                matches = rule.get("method", self.command) == self.command
                matches = matches and rule.get("path", "") in self.path
                matches = matches and rule.get("range", "") in self.headers.get("Range", "")
                if matches and rule["times"] > 0 and rule.get("key", "") in signed:
                    rule["times"] -= 1
                    return rule
            return {}

    def stall(self, rule: dict[str, Any]) -> None:
        """Stay silent until time is up or the rules are replaced."""
        with LOCK:
            LOCK.wait_for(lambda: all(each is not rule for each in RULES), rule["seconds"])
        self.close_connection = True

    def send(self, data: bytes, rule: dict[str, Any]) -> None:
        do, headers = rule.get("do"), {"ETag": tag(data), "Last-Modified": NOW}
        if do == "other version":
            headers["ETag"] = '"another"'
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if byte_range is None or do == "ignore range":
            self.answer(200, data, headers, cut=do == "cut")
            return
        first, last = int(byte_range[1]), min(int(byte_range[2]), len(data) - 1)
        if first >= len(data):
            self.refuse({"status": 416, "code": "InvalidRange"})
            return
        body = data[first : last + 1]
        if do == "wrong range":
            first, last = first + 1, last + 1
        if do == "long":
            body += b"more"
        if do == "short":
            body = body[:-1]
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.answer(206, body, headers, cut=do == "cut")

    def forward(self, rule: dict[str, Any]) -> None:
        """Forward the request, and distort the response of the other server."""
        do, sent = rule.get("do"), dict(self.headers.items())
        if do == "ignore range":
            sent.pop("Range", None)
        server = http.client.HTTPConnection(urlsplit(UPSTREAM).netloc, timeout=30)
        server.request(self.command, self.path, headers=sent)
        response = server.getresponse()
        body = response.read()
        server.close()
        hops = ("Content-Length", "Connection", "Transfer-Encoding", "Date", "Server", "Keep-Alive")
        headers = {k: v for k, v in response.getheaders() if k.title() not in hops}
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        if do == "other version":
            # The time as well: mirrors may name one file by different ETags.
            headers |= {"ETag": '"another"', "Last-Modified": LATER}
        if do == "wrong range" and "Content-Range" in headers:
            first, last, size = map(int, re.findall(r"\d+", headers["Content-Range"]))
            headers["Content-Range"] = f"bytes {first + 1}-{last + 1}/{size}"
        body = {"long": body + b"more", "short": body[:-1]}.get(str(do), body)
        self.answer(response.status, body, headers, cut=do == "cut", length=length)

    def list(self, prefix: str) -> None:
        bucket = urlsplit(self.path).path.rstrip("/")
        keys = [path.removeprefix(f"{bucket}/") for path in sorted(FILES)]
        listed = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{tag(FILES[f'{bucket}/{key}'])}</ETag>"
            f"<Size>{len(FILES[f'{bucket}/{key}'])}</Size></Contents>"
            for key in keys
            if key.startswith(prefix)
        )
        self.answer(200, f"<ListBucketResult>{listed}</ListBucketResult>".encode())

    def refuse(self, rule: dict[str, Any]) -> None:
        text = f"<Error><Code>{rule['code']}</Code><Message>{rule.get('message', '')}</Message>"
        self.answer(rule["status"], f"{text}</Error>".encode())

    def answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        cut: bool = False,
        length: str | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        pause, self.slow = self.slow / 20, 0.0
        for at in range(0, len(body), len(body) // 20 + 1) if pause else ():
            self.wfile.write(body[at : at + len(body) // 20 + 1])
            time.sleep(pause)
        if not pause:
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


NOW = "Thu, 01 Jan 2026 00:00:00 GMT"
LATER = "Fri, 02 Jan 2026 00:00:00 GMT"


def tag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'


UPSTREAM = ""

if __name__ == "__main__":
    UPSTREAM = sys.argv[2] if len(sys.argv) > 2 else ""
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
