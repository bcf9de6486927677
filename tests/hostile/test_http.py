"""Responses of a lying server are refused in one line, or are the bytes that were requested."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings

from configs.errors import DataError, MovieNetError
from configs.schema import StorageConfig
from sharding.storage.base import Range
from sharding.storage.open import open_storage
from tests.hostile.guard import kind_of
from tests.hostile.mutations import mutated
from tests.sharding.servers import serving

pytestmark = pytest.mark.slow  # a server per test, and time limits

PROGRAM = Path(__file__).with_name("lying_server.py")
BODY = b"0123456789"
TAG = b'ETag: "a"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nConnection: close\r\n'
PARTIAL = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/10\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\n" + TAG + b"Content-Length: 10\r\n\r\n" + BODY
RANGE = PARTIAL + TAG + b"Content-Length: 10\r\n\r\n" + BODY
MOST_BYTES = 64 * 1024**2
TOKENS = (
    b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n", b"ffffffffffffffff\r\n",
    b"Content-Length: 99999999999999\r\n", b"Content-Range: bytes 0-9/99999999999\r\n",
    b"Content-Range: bytes 5-14/10\r\n", b"Location: file:///etc/passwd\r\n",
    b"HTTP/1.1 302 Found\r\n", b'ETag: "b"\r\n',
    b"Last-Modified: yesterday\r\n", b"HTTP/0.9", b"\r\n\r\n", b"\0",
)  # fmt: skip


class Liar(NamedTuple):
    url: str
    folder: Path

    def requests(self) -> str:
        log = self.folder / "log"
        return log.read_text() if log.exists() else ""


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Liar]:
    (tmp_path / "answer").write_bytes(WHOLE)
    with serving(lambda port: [sys.executable, str(PROGRAM), str(port), str(tmp_path)]) as url:
        yield Liar(url, tmp_path)


def read(liar: Liar, answer: bytes, *, whole: bool, seconds: float = 2.0) -> bytes:
    """Return a file, or a range of it, as read from a server that sends ``answer``."""
    (liar.folder / "answer").write_bytes(answer)
    storage = open_storage(liar.url, StorageConfig(timeout=seconds))
    if whole:
        return storage.read("a.json")
    content = bytearray(len(BODY))
    storage.read_into([Range("a.tar", 0)], [memoryview(content)])
    return bytes(content)


def test_an_honest_response_is_read(liar: Liar) -> None:
    assert read(liar, WHOLE, whole=True) == BODY
    assert read(liar, RANGE, whole=False) == BODY


HUGE_RANGE = RANGE.replace(b"0-9/10", b"0-9/99999999999999")
FOUND = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "
NO_LENGTH = WHOLE.replace(b"Content-Length: 10\r\n", b"")
WRONG_ANSWERS = {
    "stated length": WHOLE.replace(b"Length: 10", b"Length: 99999999999999"),
    "no length, no end": NO_LENGTH + b"ENDLESS",
    "chunk without end": NO_LENGTH.replace(b"OK\r\n", b"OK\r\nTransfer-Encoding: chunked\r\n")
    + b"ENDLESS",
    "header without end": b"HTTP/1.1 200 OK\r\nX: ENDLESS",
    "stated size": HUGE_RANGE.replace(b"Length: 10", b"Length: 99999999999999"),
    "redirect to a file": FOUND + b"file:///etc/passwd\r\n\r\n",
    "redirect to itself": FOUND + b"/again\r\n\r\n",
    "not HTTP": b"\xff" * 1000 + b"ENDLESS",
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("answer", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
def test_a_lie_is_one_line_after_little_memory(liar: Liar, answer: bytes, whole: bool) -> None:
    tracemalloc.start()
    with pytest.raises(MovieNetError) as error:
        read(liar, answer, whole=whole)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(error.value).isprintable()
    assert "root:" not in str(error.value)
    assert peak < MOST_BYTES


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("bounds", [b"3-12/20", b"9-0/-1", b"0-4/10"])
def test_another_range_than_the_requested_one_is_never_data(
    liar: Liar, bounds: bytes, whole: bool
) -> None:
    with pytest.raises(MovieNetError) as error:
        read(liar, RANGE.replace(b"0-9/10", bounds), whole=whole)
    assert str(error.value).isprintable()


PIECES = {
    "the beginning": RANGE.replace(b"0-9/10", b"0-9/20"),
    "no range": RANGE.replace(b"Content-Range: bytes 0-9/10\r\n", b""),
}


@pytest.mark.parametrize("answer", PIECES.values(), ids=PIECES)
def test_a_piece_of_a_file_never_passes_for_the_file(liar: Liar, answer: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.json: .*, 4 times; the server or a proxy sends"):
        read(liar, answer, whole=True, seconds=20)


@pytest.mark.parametrize("answer", PIECES.values(), ids=PIECES)
def test_the_size_of_a_piece_never_passes_for_that_of_the_file(liar: Liar, answer: bytes) -> None:
    storage = open_storage(liar.url, StorageConfig(timeout=20))
    (liar.folder / "answer").write_bytes(WHOLE)
    assert storage.size("a.tar") == len(BODY)
    (liar.folder / "answer").write_bytes(answer)
    with pytest.raises(DataError, match=r"a\.tar: .*, 4 times; the server or a proxy sends"):
        storage.size("a.tar")


def test_a_redirect_to_another_host_receives_no_password(liar: Liar, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "answer").write_bytes(RANGE)
    with serving(lambda port: [sys.executable, str(PROGRAM), str(port), str(other)]) as url:
        target = f"HTTP/1.1 302 Found\r\nLocation: {url}/x\r\nContent-Length: 0\r\n\r\n"
        (liar.folder / "answer").write_bytes(target.encode())
        storage = open_storage(
            liar.url.replace("http://", "http://ada:5ec2et@"), StorageConfig(timeout=2)
        )
        with suppress(MovieNetError):
            storage.read_into([Range("a.tar", 0)], [memoryview(bytearray(len(BODY)))])
        assert "authorization: basic" in liar.requests().lower()
        log = other / "log"
        assert not log.exists() or "authorization" not in log.read_text().lower()


def test_a_damaged_response_is_read_or_refused_in_one_line(liar: Liar) -> None:
    @settings(
        max_examples=12,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated([WHOLE, RANGE], TOKENS))
    def check(answer: bytes) -> None:
        for whole in (True, False):
            assert kind_of(partial(read, liar, answer, whole=whole, seconds=0.5))

    check()
