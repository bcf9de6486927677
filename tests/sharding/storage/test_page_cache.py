"""Copies from mapped files: right bytes, never a signal, and writers wait for a second at most.

Real leases of the kernel, real truncation by another process.
"""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from sharding.storage.base import Range
from sharding.storage.local import DiskStorage
from sharding.storage.page_cache import PageCache
from training.stream.cache import _evict

pytestmark = pytest.mark.slow

SIZE = 300_000


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[DiskStorage]:
    """Two files of random bytes in the page cache."""
    for number, name in enumerate(("a.tar", "b.tar")):
        (tmp_path / name).write_bytes(np.random.default_rng(number).bytes(SIZE))
    with (tmp_path / "a.tar").open("rb") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError as error:
            pytest.skip(
                f"the file system of {tmp_path} has no leases, or no reads without waiting: {error}"
            )
    storage = DiskStorage(tmp_path)
    yield storage
    storage.close()


def rows(count: int, size: int = 1000) -> list[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    return [np.zeros(size, np.uint8) for _ in range(count)]


def test_rows_of_cached_files_are_their_bytes(storage: DiskStorage, tmp_path: Path) -> None:
    names, offsets = ["a.tar", "b.tar", "a.tar"], [0, 1234, SIZE - 1000]
    filled = rows(3)
    assert storage.copy_cached(names, offsets, filled)
    for name, offset, row in zip(names, offsets, filled, strict=True):
        assert row.tobytes() == (tmp_path / name).read_bytes()[offset : offset + 1000]


def test_a_file_that_is_not_in_the_page_cache_is_not_copied(
    storage: DiskStorage, tmp_path: Path
) -> None:
    with (tmp_path / "a.tar").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert not storage.copy_cached(["a.tar"], [0], rows(1))
        file.read()
    assert storage.copy_cached(["a.tar"], [0], rows(1)), "now it is"


@pytest.mark.parametrize("name", ["absent.tar", "a.tar"])
def test_missing_and_short_files_are_left_to_reading_which_explains(
    storage: DiskStorage, name: str
) -> None:
    assert not storage.copy_cached([name], [SIZE - 999], rows(1))
    with pytest.raises(DataError, match=name):
        storage.read_into([Range(name, SIZE - 999)], [memoryview(bytearray(1000))])


COPY_UNTIL_CUT = """
import sys
from pathlib import Path
import numpy as np
from configs.errors import DataError
from sharding.storage.base import Range
from sharding.storage.local import DiskStorage

storage, row = DiskStorage(Path(sys.argv[1])), np.zeros(200_000, np.uint8)
assert storage.copy_cached(["a.tar"], [0], [row])
print("mapped", flush=True)
while storage.copy_cached(["a.tar"], [50_000], [row]):
    pass
print("given up", flush=True)
sys.stdin.readline()
try:
    storage.read_into([Range("a.tar", 50_000)], [row.data])
except DataError as error:
    print(error)
"""


@pytest.mark.usefixtures("storage")
def test_a_file_that_is_cut_while_it_is_mapped_ends_in_one_line_and_not_in_a_signal(
    tmp_path: Path,
) -> None:
    """The writer waits until the reader has noticed; after that the reader reads."""
    with subprocess.Popen(
        [sys.executable, "-c", COPY_UNTIL_CUT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "mapped\n"
        cut = [sys.executable, "-c", "import os, sys; os.truncate(sys.argv[1], 100)"]
        with subprocess.Popen([*cut, str(tmp_path / "a.tar")]) as writer:
            assert reader.stdout.readline() == "given up\n"
            assert writer.wait(timeout=300) == 0
        reader.stdin.write("\n")
        reader.stdin.flush()
        (line,) = reader.stdout.read().splitlines()
    assert reader.returncode == 0
    assert "a.tar" in line
    assert "200,000" in line or "200000" in line


def test_a_file_that_is_replaced_while_it_is_mapped_keeps_its_bytes(
    storage: DiskStorage, tmp_path: Path
) -> None:
    before, (row,) = (tmp_path / "a.tar").read_bytes(), rows(1, SIZE)
    assert storage.copy_cached(["a.tar"], [0], [row])
    (tmp_path / "new").write_bytes(bytes(SIZE))
    (tmp_path / "new").replace(tmp_path / "a.tar")
    assert storage.copy_cached(["a.tar"], [0], [row])
    assert row.tobytes() == before


def test_a_closed_storage_makes_no_writer_wait(storage: DiskStorage, tmp_path: Path) -> None:
    assert storage.copy_cached(["a.tar"], [0], rows(1))
    with pytest.raises(BlockingIOError):  # opening without waiting, while there is a lease
        os.open(tmp_path / "a.tar", os.O_WRONLY | os.O_NONBLOCK)
    storage.close()
    os.close(os.open(tmp_path / "a.tar", os.O_WRONLY | os.O_NONBLOCK))


def test_a_writer_waits_for_an_idle_reader_only_until_the_next_check(
    storage: DiskStorage, tmp_path: Path
) -> None:
    """The kernel itself would end the lease after 45 s; then the copy below would end by SIGBUS."""
    assert storage.copy_cached(["a.tar"], [0], rows(1))
    os.truncate(tmp_path / "a.tar", 100)
    assert not storage.copy_cached(["a.tar"], [0], rows(1))


def test_an_entry_that_is_mapped_can_be_evicted_by_the_same_process(
    storage: DiskStorage, tmp_path: Path
) -> None:
    assert storage.copy_cached(["a.tar"], [0], rows(1))
    _evict(tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()
    storage.forget("a.tar")
    assert not storage.copy_cached(["a.tar"], [0], rows(1))


def test_a_file_that_this_process_has_replaced_is_read_anew(storage: DiskStorage) -> None:
    (row,) = rows(1)
    assert storage.copy_cached(["a.tar"], [0], [row])
    storage.publish("a.tar", bytes(SIZE), replace=True)
    assert storage.copy_cached(["a.tar"], [0], [row])
    assert not row.any()


def test_without_a_free_handle_nothing_is_mapped_and_none_is_lost(
    storage: DiskStorage,
) -> None:
    """Opening works, but a mapping needs a second handle."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + 1, limits[1]))
    try:
        assert not storage.copy_cached(["a.tar"], [0], rows(1))
        os.close(os.dup(0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_forked_child_neither_copies_nor_ends_the_lease_of_its_parent(
    storage: DiskStorage, tmp_path: Path
) -> None:
    assert storage.copy_cached(["a.tar"], [0], rows(1))
    child = os.fork()
    if not child:
        copied = storage.copy_cached(["a.tar"], [0], rows(1))
        storage.close()
        os._exit(int(copied))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(BlockingIOError):
        os.open(tmp_path / "a.tar", os.O_WRONLY | os.O_NONBLOCK)


@pytest.mark.usefixtures("storage")
def test_no_more_files_than_the_limit_are_mapped(tmp_path: Path) -> None:
    cache = PageCache(lambda name: os.open(tmp_path / name, os.O_RDONLY), limit=1)
    assert cache.copy(["a.tar"], [0], rows(1))
    handles = set(Path("/proc/self/fd").iterdir())
    assert not cache.copy(["b.tar"], [0], rows(1))
    assert set(Path("/proc/self/fd").iterdir()) == handles
    cache.close()
