"""The same movies in every form in which a dump may be delivered."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from configs.errors import ConfigError, DataError
from sharding.storage.memory import MemoryStorage
from tests.sharding.films import build_all, film, write_folder, write_tar

Movies = Mapping[str, Mapping[str, bytes]]
MOVIES = {f"tt{k}": film(f"tt{k}", shots=2 + k % 3) for k in range(5)}
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
MTIME = (10**18, 10**18)


def tar_bytes(files: Mapping[str, bytes], prefix: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(files: Mapping[str, bytes], method: int = STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def below(prefix: str, movies: Movies) -> dict[str, bytes]:
    return {
        f"{prefix}{m}/{name}": data for m, files in movies.items() for name, data in files.items()
    }


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=MTIME)
    return path


def put_parts(path: Path, data: bytes, suffixes: list[str]) -> None:
    size = -(-len(data) // len(suffixes))
    for k, suffix in enumerate(suffixes):
        put(path.with_name(f"{path.name}.{suffix}"), data[k * size : (k + 1) * size])


def plain(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        write_folder(root, movie, files)
    return root


def doubled(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        write_folder(root / movie, movie, files)
    return root


def all_levels(root: Path, movies: Movies) -> Path:
    plain(root / "240P" / "all", movies)
    return root


def tars(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        write_tar(root, movie, files)
    return root


def gzipped_tars(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        put(root / f"{movie}.tar.gz", gzip.compress(tar_bytes(files, f"{movie}/")))
    return root


def gzips_in_parts(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        put_parts(root / f"{movie}.tar.gz", gzip.compress(tar_bytes(files)), ["00", "01", "02"])
    return root


def mixture(root: Path, movies: Movies) -> Path:
    makers = [plain, tars, gzipped_tars, doubled, all_levels, zip_in_folder]
    for k, (movie, files) in enumerate(movies.items()):
        makers[k % len(makers)](root, {movie: files})
    return root


def zip_in_folder(root: Path, movies: Movies) -> Path:
    put(root / "extra.zip", zip_bytes(below("", movies)))
    return root


def several_zips(root: Path, movies: Movies) -> Path:
    for movie, files in movies.items():
        put(root / "zips" / f"{movie}.zip", zip_bytes(files))
    return root


def zip_of_images(root: Path, movies: Movies) -> Path:
    return put(root / "movies.zip", zip_bytes(below("frames/", movies)))


def zip_of_doubled(root: Path, movies: Movies) -> Path:
    files = {f"{m}/{m}/{n}": data for m, files in movies.items() for n, data in files.items()}
    return put(root / "movies.zip", zip_bytes(files))


def deflated_zip(root: Path, movies: Movies) -> Path:
    return put(root / "movies.zip", zip_bytes(below("240P/all/", movies), DEFLATED))


def mixed_up_zip(root: Path, movies: Movies) -> Path:
    files = below("", movies)
    order = sorted(files, key=lambda name: (name.rpartition("/")[2], name))
    return put(root / "movies.zip", zip_bytes({name: files[name] for name in order}))


def zip_of_tars(root: Path, movies: Movies) -> Path:
    files = {f"240P/{m}.tar": tar_bytes(files) for m, files in movies.items()}
    return put(root / "movies.zip", zip_bytes(files))


def zip_of_deflated_tars(root: Path, movies: Movies) -> Path:
    files = {f"240P/{m}.tar": tar_bytes(files, f"{m}/") for m, files in movies.items()}
    return put(root / "movies.zip", zip_bytes(files, DEFLATED))


def zip_of_gzipped_tars(root: Path, movies: Movies) -> Path:
    files = {f"{m}.tar.gz": gzip.compress(tar_bytes(files)) for m, files in movies.items()}
    return put(root / "movies.zip", zip_bytes(files))


def zip_in_parts(root: Path, movies: Movies) -> Path:
    put_parts(root / "movies.zip", zip_bytes(below("", movies)), ["001", "002", "003", "004"])
    return root / "movies.zip.001"


def folder_of_zip_parts(root: Path, movies: Movies) -> Path:
    put_parts(root / "movies.zip", zip_bytes(below("", movies)), ["aa", "ab", "ac"])
    return root


def one_tar(root: Path, movies: Movies) -> Path:
    return put(root / "movies.tar", tar_bytes(below("./240P/", movies)))


def tar_in_parts(root: Path, movies: Movies) -> Path:
    put_parts(root / "movies.tar", tar_bytes(below("", movies)), ["00", "01"])
    return root / "movies.tar"


def published(dump: Path, shard_bytes: int = 5_000) -> dict[str, bytes]:
    """Return tars, indices and manifest; plan and sidecars contain the source, so they differ."""
    storage = MemoryStorage()
    build_all(storage, dump, shard_bytes=shard_bytes)
    suffixes = (".tar", ".index.npz", "manifest.json")
    return {name: storage.read(name) for name in storage.names() if name.endswith(suffixes)}


def expect_one_line(dump: Path, match: str) -> None:
    with pytest.raises((DataError, ConfigError), match=match) as error:
        published(dump)
    assert "\n" not in str(error.value)


def rejected(dump: Path) -> dict[str, str]:
    storage = MemoryStorage()
    build_all(storage, dump, max_bad_fraction=0.5)
    rows = map(json.loads, storage.read("rejected.jsonl").splitlines())
    return {row["member"]: row["reason"] for row in rows}
