"""Small dumps, and storages whose process is killed, for the tests of sharding."""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from configs.errors import DataError
from sharding.build import build_shards, publish_plan
from sharding.dump.scan import read_movies
from sharding.format.manifest import Manifest
from sharding.format.plan import Plan
from sharding.plan import make_plan
from sharding.seal import seal_frames
from sharding.storage.local import DiskStorage
from sharding.storage.memory import MemoryStorage

Storage = MemoryStorage | DiskStorage
GOLDEN = Path(__file__).parents[1] / "golden"


def jpeg(key: object, size: int = 300) -> bytes:
    """Return bytes with the start and end markers of a JPEG; they depend on ``key`` and size."""
    body = random.Random(repr(key)).randbytes(max(0, size - 6)).replace(b"\xff", b"\x00")
    return b"\xff\xd8\xff\xe0" + body + b"\xff\xd9"


def film(movie: str, shots: int = 2, images: int = 3, size: int = 300) -> dict[str, bytes]:
    """Return the images of a movie by file name."""
    return {
        f"shot_{shot:04d}_img_{image}.jpg": jpeg((movie, shot, image), size + shot)
        for shot in range(shots)
        for image in range(images)
    }


def write_folder(dump: Path, movie: str, files: Mapping[str, bytes], mtime: int = 10**18) -> None:
    """Write a movie as a folder; all files have the same modification time."""
    (dump / movie).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (dump / movie / name).write_bytes(data)
        os.utime(dump / movie / name, ns=(mtime, mtime))


def write_tar(
    dump: Path, movie: str, files: Mapping[str, bytes], prefix: str = "", mtime: int = 10**18
) -> None:
    """Write a movie as a tar."""
    dump.mkdir(parents=True, exist_ok=True)
    path = dump / f"{movie}.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    os.utime(path, ns=(mtime, mtime))


def write_dump(dump: Path, n_movies: int = 5) -> None:
    """Write a small dump of tars and folders."""
    for k in range(n_movies):
        movie = f"tt{k:07d}"
        write = write_tar if k % 2 else write_folder
        write(dump, movie, film(movie, shots=2 + k % 3))


def build_all(
    storage: Storage,
    dump: Path,
    *,
    shard_bytes: int = 6_000,
    max_bad_fraction: float = 0.01,
    replace: bool = False,
) -> Manifest:
    """Plan, build and seal."""
    plan = make_plan(read_movies(dump), shard_bytes=shard_bytes)
    publish_plan(storage, plan, replace=replace)
    build_planned(storage, dump, plan, max_bad_fraction=max_bad_fraction, replace=replace)
    return seal_frames(storage, max_bad_fraction=max_bad_fraction)


def build_planned(
    storage: Storage,
    dump: Path,
    plan: Plan,
    *,
    max_bad_fraction: float = 0.01,
    replace: bool = False,
) -> None:
    """Build every shard of a plan."""
    numbers = range(len(plan.shards))
    build_shards(storage, dump, plan, numbers, max_bad_fraction=max_bad_fraction, replace=replace)


class Killed(BaseException):
    """End of a simulated process."""


class Mortal(MemoryStorage):
    """Storage whose process is killed before its n-th change."""

    def __init__(self, files: dict[str, bytes], life: int) -> None:
        super().__init__()
        self.files = files
        self.life = life

    def publish(self, name: str, data: bytes, *, replace: bool = False) -> None:
        self._age()
        super().publish(name, data, replace=replace)

    @contextmanager
    def publishing(self, name: str, *, replace: bool = False) -> Iterator[BinaryIO]:
        buffer = io.BytesIO()
        yield buffer
        self.publish(name, buffer.getvalue(), replace=replace)

    def remove(self, name: str) -> None:
        self._age()
        super().remove(name)

    def _age(self) -> None:
        if self.life == 0:
            raise Killed
        self.life -= 1


def is_silent_or_one_line(call: Callable[[], object]) -> bool:
    """Return whether a call succeeds, or raises a ``DataError`` of one line."""
    try:
        call()
    except DataError as error:
        return "\n" not in str(error)
    return True


def check_golden(name: str, data: bytes) -> None:
    """Compare with a golden file; ``make golden`` writes it."""
    path = GOLDEN / name
    if os.environ.get("MOVIENET_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert data == path.read_bytes(), f"{name} changed: add an entry to the CHANGELOG"


def shard_of(dump: Path) -> bytes:
    storage = MemoryStorage()
    build_all(storage, dump, shard_bytes=10**9)
    return storage.read("frames-00000.tar")


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
