from __future__ import annotations

import errno
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.runtime.publish import TEMPORARY_PREFIX
from sharding.storage.base import Range, Storage
from sharding.storage.local import DiskStorage
from sharding.storage.memory import MemoryStorage
from sharding.storage.open import open_storage

Make = Callable[[Path], Storage]
BACK_ENDS = pytest.mark.parametrize("make", [DiskStorage, lambda _: MemoryStorage()])


@BACK_ENDS
def test_published_files_are_listed_and_read(tmp_path: Path, make: Make) -> None:
    storage = make(tmp_path / "new" / "set")
    assert storage.names() == []
    storage.publish("b.tar", b"bytes")
    with storage.publishing("a.tar") as file:
        file.write(b"more ")
        file.write(b"bytes")
        assert storage.names() == ["b.tar"]
    assert storage.names() == ["a.tar", "b.tar"]
    assert (storage.size("a.tar"), storage.size("c.tar")) == (10, None)
    assert storage.read("a.tar") == b"more bytes"
    with storage.open("a.tar") as file:
        file.seek(5)
        assert file.read() == b"bytes"
    storage.remove("a.tar")
    storage.remove("a.tar")
    assert storage.names() == ["b.tar"]


@BACK_ENDS
def test_a_failed_block_publishes_nothing(tmp_path: Path, make: Make) -> None:
    storage = make(tmp_path)
    storage.publish("a.tar", b"old")

    def fail() -> None:
        with storage.publishing("a.tar", replace=True) as file:
            file.write(b"new")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert storage.read("a.tar") == b"old"
    assert not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))


@BACK_ENDS
def test_an_existing_file_is_replaced_only_on_request(tmp_path: Path, make: Make) -> None:
    storage = make(tmp_path)
    storage.publish("a.tar", b"old")
    with pytest.raises(DataError, match=r"a\.tar already exists; pass `--replace`"):
        storage.publish("a.tar", b"new")
    storage.publish("a.tar", b"new", replace=True)
    assert storage.read("a.tar") == b"new"


@BACK_ENDS
def test_ranges_are_read_into_buffers(tmp_path: Path, make: Make) -> None:
    storage = make(tmp_path)
    storage.publish("a", bytes(range(256)))
    storage.publish("b", b"xyz")
    buffers = [bytearray(3), bytearray(0), bytearray(2)]
    ranges = [Range("a", 250), Range("a", 9), Range("b", 1)]
    storage.read_into(ranges, [memoryview(buffer) for buffer in buffers])
    assert buffers == [b"\xfa\xfb\xfc", b"", b"yz"]
    with pytest.raises(ValueError, match="shorter"):
        storage.read_into(ranges, [memoryview(bytearray(1))])


@BACK_ENDS
def test_a_short_read_is_an_error_with_name_offset_and_lengths(tmp_path: Path, make: Make) -> None:
    storage = make(tmp_path)
    storage.publish("a.tar", bytes(10))
    with pytest.raises(DataError, match=r"a\.tar: got 3 bytes at 7, want 8; the file is truncated"):
        storage.read_into([Range("a.tar", 7)], [memoryview(bytearray(8))])


@BACK_ENDS
def test_a_missing_file_is_named(tmp_path: Path, make: Make) -> None:
    storage = make(tmp_path)
    for read in (storage.read, storage.open):
        with pytest.raises(DataError, match=r"no file a\.tar"):
            read("a.tar")
    with pytest.raises(DataError, match=r"no file a\.tar"):
        storage.read_into([Range("a.tar", 0)], [memoryview(bytearray(1))])


@BACK_ENDS
@pytest.mark.parametrize("name", ["", "a/b", "../a", "/etc/passwd", ".hidden", "a\0b"])
def test_only_plain_names_reach_the_file_system(tmp_path: Path, make: Make, name: str) -> None:
    storage = make(tmp_path)
    for call in (storage.size, storage.read, storage.open, storage.remove):
        with pytest.raises(ValueError, match="want a plain name"):
            call(name)
    with pytest.raises(ValueError, match="want a plain name"):
        storage.publish(name, b"")
    with pytest.raises(ValueError, match="want a plain name"):
        storage.read_into([Range(name, 0)], [memoryview(bytearray(1))])


def test_concurrent_threads_read_more_files_than_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.storage.open_files.MAX_OPEN_FILES", 4)
    storage = DiskStorage(tmp_path)
    for k in range(20):
        storage.publish(f"f{k}", bytes([k]) * 100)
    wrong: list[int] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(300):
            k, buffer = chance.randrange(20), bytearray(50)
            storage.read_into([Range(f"f{k}", chance.randrange(50))], [memoryview(buffer)])
            if bytes(buffer) != bytes([k]) * 50:
                wrong.append(k)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # a list of numbers
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(os.listdir("/proc/self/fd")) <= before + 4  # noqa: PTH208
    storage.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    storage.read_into([Range("f1", 0)], [memoryview(bytearray(1))])


def test_a_replaced_file_is_opened_again(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)
    buffer = bytearray(3)
    for data in (b"old", b"new"):
        storage.publish("a", data, replace=True)
        storage.read_into([Range("a", 0)], [memoryview(buffer)])
        assert bytes(buffer) == data


def test_only_old_leftovers_of_killed_processes_are_deleted(
    tmp_path: Path,
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, old = socket.gethostname(), 10**9
    keep = [
        f"{TEMPORARY_PREFIX}a-{host}-{os.getpid()}-0123abcd",
        f"{TEMPORARY_PREFIX}a-else-1-0123abcd",
    ]
    abandoned = f"{TEMPORARY_PREFIX}a-{host}-{ended.pid}-0123abcd"
    fresh = f"{TEMPORARY_PREFIX}b-{host}-{ended.pid}-0123abcd"
    for name in [*keep, abandoned, fresh]:
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (old, old))
    os.utime(tmp_path / fresh)
    storage = DiskStorage(tmp_path)
    assert storage.names() == []
    storage.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*keep, fresh])


def test_a_folder_that_does_not_exist_reports_the_space_of_its_parent(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "a" / "b"))
    free = storage.space().free.n_bytes
    assert free is not None
    assert free > 0
    assert not (tmp_path / "a").exists()


def test_a_pipe_in_place_of_a_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plan.json")
    storage = DiskStorage(tmp_path)
    with pytest.raises(DataError, match="got a pipe, device or folder, want a file"):
        storage.read("plan.json")
    with pytest.raises(DataError, match="got a pipe, device or folder, want a file"):
        storage.open("plan.json")
    with pytest.raises(DataError, match="got a pipe, device or folder, want a file"):
        storage.read_into([Range("plan.json", 0)], [memoryview(bytearray(1))])
