from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.dump.readers import GZIP, Inflated, LocalFile
from sharding.storage.memory import MemoryStorage
from tests.sharding.dump.deliveries import MOVIES, expect_one_line, gzipped_tars, published, put
from tests.sharding.films import build_all, film, write_tar

MOVIE = "tt0032138"


def test_a_read_error_in_a_tar_is_never_taken_for_a_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path, MOVIE, film(MOVIE))

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match=rf"Input/output error: .*{MOVIE}\.tar"):
        build_all(MemoryStorage(), tmp_path, max_bad_fraction=1.0)


def test_a_truncated_gzip_is_reported_with_its_size(tmp_path: Path) -> None:
    gzipped_tars(tmp_path, {"tt1": MOVIES["tt1"]})
    path = tmp_path / "tt1.tar.gz"
    path.write_bytes(path.read_bytes()[:1000])
    expect_one_line(tmp_path, r"tt1\.tar\.gz: got 1000 compressed bytes, want more: .*truncated")


def test_a_corrupt_gzip_is_reported_with_the_offset(tmp_path: Path) -> None:
    gzipped_tars(tmp_path, {"tt1": MOVIES["tt1"]})
    path = tmp_path / "tt1.tar.gz"
    data = bytearray(path.read_bytes())
    data[600:700] = bytes(100)
    path.write_bytes(data)
    expect_one_line(tmp_path, r"tt1\.tar\.gz: corrupt at compressed byte \d+")


def test_zeros_after_a_gzip_are_ignored_and_other_bytes_are_refused(tmp_path: Path) -> None:
    gzipped_tars(tmp_path, {"tt1": MOVIES["tt1"]})
    path = tmp_path / "tt1.tar.gz"
    data = path.read_bytes()
    expected = published(tmp_path)
    path.write_bytes(data + bytes(100_000))
    assert published(tmp_path) == expected
    path.write_bytes(data + bytes(512) + b"reel 2")
    expect_one_line(tmp_path, r"tt1\.tar\.gz: got 6 bytes after the end of the gzip stream")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    """Return random bytes, and a file of two gzip streams that contains them."""
    content = os.urandom(40_000) * 500  # 20 MB: beyond two marks
    middle = 12_345_678
    streams = gzip.compress(content[:middle], 1) + gzip.compress(content[middle:], 1)
    return content, put(tmp_path_factory.mktemp("stream") / "x.gz", streams)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=30)
def test_a_stream_is_read_at_any_offsets_in_any_order(
    packed: tuple[bytes, Path], data: st.DataObject
) -> None:
    content, path = packed
    stream = Inflated("x.gz", LocalFile("x.gz", [path]), GZIP)
    places = st.tuples(st.integers(0, len(content) + 10), st.integers(0, 3_000_000))
    for at, length in data.draw(st.lists(places, min_size=1, max_size=6)):
        assert stream.pread(at, length) == content[at : at + length]
    assert stream.end() == len(content)
    stream.close()


FEW_FILES = """
import resource, sys
from pathlib import Path

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from sharding.dump.archives import local_archive

file = local_archive(Path(sys.argv[1]))
sys.stdout.buffer.write(file.pread(0, file.end()))
file.close()
"""


def test_an_archive_of_100_parts_is_read_by_a_process_that_may_open_64_files(
    tmp_path: Path,
) -> None:
    content = os.urandom(10_000)
    for part in range(100):
        (tmp_path / f"x.tar.{part:03d}").write_bytes(content[part * 100 :][:100])
    command = [sys.executable, "-c", FEW_FILES, str(tmp_path / "x.tar")]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert (done.stdout, done.stderr) == (content, b"")
