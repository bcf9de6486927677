"""Small files that state or expand to gigabytes take little memory."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from configs.errors import ConfigError
from sharding.format import tar
from sharding.storage.patterns import expand
from tests.hostile import corpus
from tests.hostile.guard import kind_of, limited_memory, outcome
from tests.hostile.targets import TARGETS, Target
from tests.sharding.external_films import config_of

pytestmark = pytest.mark.slow  # hundreds of megabytes

BIG = 160 * 1024**2

MOST_BYTES = 150 * 1024**2
"""Two images of ``MAX_IMAGE_BYTES`` and a little more: packed, and as bytes to decode."""


def _laughs() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    return "\n".join(lines).encode()


def _merges() -> bytes:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 10)}]}}" for k in range(1, 12)]
    return "\n".join(lines).encode()


def _shared_lists() -> bytes:
    value: object = ["Drama"]
    for _ in range(60):
        value = [value, value]
    return pickle.dumps({"tt1": value})


def _shared_tuples() -> bytes:
    value: object = ("Drama",)
    for _ in range(60):
        value = (value, value)
    return pickle.dumps({"tt1": value}, 2)[:-2] + b"N" + pickle.dumps(value, 2)[2:-1] + b"1."


def _compressed(archive: bytes, end: str, data: bytes) -> bytes:
    """Return a zip in which a member is replaced by a deflated one."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as source,
        zipfile.ZipFile(buffer, "w", compresslevel=1) as target,
    ):
        for name in source.namelist():
            big = name.endswith(end)
            method = zipfile.ZIP_DEFLATED if big else zipfile.ZIP_STORED
            target.writestr(name, data if big else source.read(name), method)
    return buffer.getvalue()


def _overlapping() -> bytes:
    """Return a checkpoint of 200 storages that all share the bytes of one."""
    buffer, weight = io.BytesIO(), torch.zeros(2**20)
    torch.save({f"w{k}": torch.zeros(k + 1) for k in range(200)} | {"big": weight}, buffer)
    archive = buffer.getvalue()
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        big = max(source.infolist(), key=lambda member: member.file_size)
        offset = archive.index(b"PK\x01\x02")
        directory = archive[offset:]
        for member in source.infolist():
            if "/data/" in member.filename:
                at = directory.index(member.filename.encode())
                old = directory[at - 46 : at]
                new = (
                    old[:16] + struct.pack("<3L", big.CRC, big.file_size, big.file_size) + old[28:]
                )
                directory = directory.replace(old + member.filename.encode(),
                                              new + member.filename.encode())  # fmt: skip
    return archive[:offset] + directory


def _npz_header() -> bytes:
    name = "movies_sha256.npy"
    text = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }"
    return corpus.with_member(corpus.labels()[0], name, (text % 2**40).ljust(127) + b"\n")


def _jpeg() -> bytes:
    data = bytearray(corpus.images()[0])
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">2H", 65_500, 65_500)
    return bytes(data)


def _png(height: int, width: int, rows: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
        )

    head = struct.pack(">2L5B", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(rows * (3 * width + 1)), 9)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _text_png() -> bytes:
    text = b"k\0\0" + zlib.compress(bytes(BIG), 1)
    chunk = (
        struct.pack(">L", len(text))
        + b"zTXt"
        + text
        + struct.pack(">L", zlib.crc32(b"zTXt" + text))
    )
    png = _png(4, 4, 4)
    return png[:33] + chunk + png[33:]


def _gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "GIF")
    data = bytearray(buffer.getvalue())
    data[6:10] = struct.pack("<2H", 65_535, 65_535)
    return bytes(data)


def _tar_header(kind: bytes, size: bytes) -> bytes:
    head = bytearray(tar.header("tt1/shot_0000_img_0.jpg", 0))
    head[124:136], head[156:157] = size.ljust(12, b"\0"), kind
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + bytes(1024)


def _zip_image(stated: int) -> bytes:
    """Return a zip of an image that inflates to 160 MiB, and states ``stated`` bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("tt1/shot_0000_img_0.jpg", bytes(BIG))
    data = bytearray(buffer.getvalue())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<L", stated)
    return bytes(data)


def _expanded() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1).expand(2**40)}, buffer)
    return buffer.getvalue()


def bombs() -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Yield name, target and contents of each file."""
    deep = b"[" * 200_000
    yield "YAML aliases", "config YAML", _laughs
    yield "YAML merge keys", "config YAML", _merges
    yield "YAML list in itself", "config YAML", lambda: b"data: &a [*a]"
    yield "YAML nesting", "config YAML", lambda: b"data: " + deep
    yield "YAML of 17 MiB", "config YAML", lambda: b"a: b\n" * 3_600_000
    for name in ("plan JSON", "manifest JSON", "metadata JSON", "split JSON", "encode plan JSON"):
        yield f"{name} nesting", name, lambda: b'{"a":' * 100_000
    yield "pickle of a length", "metadata pickle", lambda: b"cbuiltins\nbytes\n(I99999999999\ntR."
    yield "pickle of shared lists", "metadata pickle", _shared_lists
    yield "pickle of shared tuples", "metadata pickle", _shared_tuples
    yield (
        "pickle frame",
        "metadata pickle",
        lambda: b"\x80\x05\x96" + (2**36).to_bytes(8, "little") + b"x",
    )
    yield "npy header length", "npy header", lambda: b"\x93NUMPY\x02\x00" + b"\xff" * 4 + b"{"
    yield "npz header", "labels npz", _npz_header
    yield (
        "npz compressed",
        "labels npz",
        lambda: _compressed(corpus.labels()[0], "genres.npy", bytes(BIG)),
    )
    yield "tar huge member", "movie tar", lambda: _tar_header(b"0", b"\x80" + b"\x0f" * 11)
    yield "tar negative size", "movie tar", lambda: _tar_header(b"0", b"\xff" * 12)
    yield "tar long name", "movie tar", lambda: _tar_header(b"L", b"77777777777")
    yield "tar sparse", "movie tar", lambda: _tar_header(b"S", b"77777777777")
    yield "gzip of zeros", "movie tar.gz", lambda: gzip.compress(bytes(BIG), 1)
    yield "zip small stated size", "movies zip", lambda: _zip_image(300)
    yield "zip large stated size", "movies zip", lambda: _zip_image(BIG)
    yield "feature tar huge array", "feature tar", _huge_array
    for name in ("image check", "image decode"):
        yield f"{name}: JPEG of 65,500²", name, _jpeg
        yield f"{name}: PNG of 60,000²", name, lambda: _png(60_000, 60_000, 1)
        yield f"{name}: PNG with text", name, _text_png
        yield f"{name}: GIF of 65,535²", name, _gif
    yield "safetensors header", "safetensors", lambda: (2**40).to_bytes(8, "little") + b"{}"
    yield (
        "checkpoint compressed",
        "torch checkpoint",
        lambda: _compressed(corpus.checkpoints()[0], "/data/0", bytes(BIG)),
    )
    yield "checkpoint overlapping", "torch checkpoint", _overlapping
    yield "checkpoint expanded tensor", "torch checkpoint", _expanded
    yield (
        "TorchScript compressed",
        "TorchScript archive",
        lambda: _compressed(corpus.torchscripts()[0], "/data.pkl", bytes(BIG)),
    )


def _huge_array() -> bytes:
    text = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f2', 'fortran_order': False, 'shape': (%d, 4), }"
    npy, buffer = (text % 2**40).ljust(127) + b"\n" + bytes(64), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("tt0000001.features.npy")
        member.size = len(npy)
        archive.addfile(member, io.BytesIO(npy))
    return buffer.getvalue()


def _peak_bytes() -> int:
    """Return the largest resident size since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _read(target: Target, path: Path, data: bytes) -> tuple[str, int]:
    """Return the outcome, and how many bytes were allocated, or touched outside Python."""
    path.write_bytes(data)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak_bytes()
    tracemalloc.start()
    try:
        kind = outcome(lambda: target.parse(path), target.reasons)
        _, requested = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return kind, max(requested, _peak_bytes() - before)


@pytest.fixture(autouse=True)
def _limited_memory() -> Iterator[None]:
    with limited_memory():
        yield


@pytest.mark.parametrize(("parser", "make"), [pytest.param(*rest, id=n) for n, *rest in bombs()])
def test_a_small_file_that_stands_for_gigabytes_takes_little_memory(
    parser: str, make: Callable[[], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target, data = TARGETS[parser], make()
    path = tmp_path / target.file
    path.parent.mkdir(parents=True, exist_ok=True)
    config_of(tmp_path, "")  # writes the metadata of feature tars
    path.write_bytes(target.corpus()[0])
    kind_of(lambda: target.parse(path), target.reasons)  # loads the libraries that it needs
    kind, n_bytes = _read(target, path, data)
    assert kind in ("ok", "ConfigError", "DataError", "BadImage")
    assert n_bytes < MOST_BYTES, f"{kind} after {n_bytes:,} bytes"


def test_a_pattern_of_more_than_a_million_files_is_refused_before_it_is_expanded() -> None:
    with pytest.raises(ConfigError, match="more than 1,000,000 files"):
        expand("x-{0..9999}-{0..9999}.tar")
    with pytest.raises(ConfigError, match="more than 1,000,000 files"):
        expand("x-{0..999999999999}.tar")
