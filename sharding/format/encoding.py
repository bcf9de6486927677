"""Canonical JSON, ``.npy``, ``.npz`` and sha256: equal values give equal bytes on every machine.

JSON has sorted keys and no spaces, arrays are little-endian, and archives contain no timestamps.
Errors name the file and the corrupt field.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from configs.corrupt import report_corrupt
from configs.errors import DataError

FORMAT = 1
"""Version of the on-disk format; files of any other version are refused."""
REBUILD = "delete it and rerun the command that wrote it"
"""Remedy for a corrupt file."""
T = TypeVar("T")
_MAX_HEADER_BYTES = 64 * 1024
_LONG = re.compile(rb"(\d)L(?=[,)])")
"""Last digit of a number in a header that Python 2 wrote."""


def canonical_json(value: object) -> bytes:
    """Return JSON with sorted keys, no spaces, ASCII only and a newline at the end.

    Raises:
        ValueError: a number is not finite.
    """
    return (json_text(value) + "\n").encode("ascii")


def sha256_hex(data: bytes | memoryview) -> str:
    """Return the sha256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def npz_bytes(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return an uncompressed ``.npz`` of ``arrays``, in their order and without timestamps."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix; the default depends on the operating system
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, npy_bytes(array))
    return buffer.getvalue()


def npz_arrays(data: bytes, where: str, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays ``names`` out of an ``.npz``.

    No array takes more memory than the file: compressed ones are refused, and so is a header that
    states other than the bytes after it.

    Raises:
        DataError: the file is corrupt, or an array is missing.
    """
    with (
        report_corrupt(where, REBUILD, problem="not a valid .npz"),
        zipfile.ZipFile(io.BytesIO(data)) as archive,
    ):
        return {name: _array_of(archive, f"{name}.npy", len(data)) for name in names}


def _array_of(archive: zipfile.ZipFile, name: str, most: int) -> npt.NDArray[Any]:
    size = archive.getinfo(name).file_size
    if size > most:
        raise ValueError(f"{name}: got {size:,} bytes in a file of {most:,}, want them as stored")
    content = archive.read(name)
    header = read_npy_header(io.BytesIO(content), len(content), name)
    if header.dtype.hasobject or header.file_bytes != len(content):
        raise ValueError(
            f"{name}: got {len(content)} bytes, want {header.file_bytes} of {header.dtype}"
        )
    values = np.frombuffer(content, header.dtype, offset=header.n_bytes)
    order: Literal["C", "F"] = "F" if header.fortran_order else "C"
    return values.reshape(header.shape, order=order).copy()  # writeable, as from numpy.load


def npy_header(array: npt.NDArray[Any]) -> bytes:
    """Return the ``.npy`` header (version 1.0) of ``array``, the same with every numpy."""
    shape, descr = tuple(int(n) for n in array.shape), array.dtype.newbyteorder("<").str
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    # numpy pads headers to a multiple of 64 bytes, in practice to 128.
    total = max(128, -(-(10 + len(text) + 1) // 64) * 64)
    padded = text.ljust(total - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode("ascii")


class NpyHeader(NamedTuple):
    """The header of a ``.npy``."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    n_bytes: int
    """Length of the header; the values follow it."""

    @property
    def file_bytes(self) -> int:
        """Length of the complete ``.npy``."""
        return self.n_bytes + self.dtype.itemsize * math.prod(self.shape)


def read_npy_header(file: BinaryIO, size: int, where: str) -> NpyHeader:
    """Read the header of a ``.npy``, and at most two bytes of its values.

    Args:
        file: A file at the first byte of the ``.npy``, e.g. of a member of a tar.
        size: Length of the ``.npy`` in bytes, its values included.
        where: File and member, for error messages.

    Raises:
        DataError: the header is invalid.
    """
    start = file.read(min(12, size))
    # The length follows magic and version: two bytes in version 1, four in later ones.
    length_field = start[8:10] if start[6:7] == b"\x01" else start[8:12]
    length = 8 + len(length_field) + int.from_bytes(length_field, "little")
    rest = min(length, size, _MAX_HEADER_BYTES) - len(start)
    text = start + file.read(max(0, rest))
    # Python 2 wrote (10L, 512L), of which numpy would print a warning.
    header = io.BytesIO(text[:10] + _LONG.sub(rb"\1 ", text[10:]))
    with report_corrupt(where, "copy it again", problem="not a .npy array"):
        if b"\\" in header.getvalue()[10:]:
            raise ValueError("backslash in the header")  # of which Python would print a warning
        version = np.lib.format.read_magic(header)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
        else:
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(header)
        if min(shape, default=0) < 0:
            raise ValueError(f"got {dtype} {list(shape)}")
        return NpyHeader(shape, dtype, fortran_order, header.tell())


def rows_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a table of rows, without axes of length 1.

    ``(N, D)`` for ``[N, 1, D]``, ``[1, N, D]`` and ``[N, D, 1, 1]``; ``(1, D)`` for ``[D]``. All
    other shapes are returned as they are.
    """
    long = tuple(size for size in shape if size != 1)
    if len(shape) == 1:
        return (1, *shape)
    if len(shape) > 2 and len(long) <= 2:
        return (1,) * (2 - len(long)) + long
    return shape


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """Return ``array`` as a little-endian ``.npy`` in C order."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return npy_header(array) + little.tobytes()


def json_text(value: object) -> str:
    """Return canonical JSON without the newline at the end."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def json_with_rows(
    head: Mapping[str, object], rows_key: str, rows: Sequence[Mapping[str, object]]
) -> bytes:
    """Return canonical JSON with one line per key, and one per row of the list ``rows_key``."""
    body = ",\n".join(json_text(row) for row in rows)
    values = {key: json_text(value) for key, value in head.items()}
    values[rows_key] = f"[\n{body}\n]" if rows else "[]"
    lines = ",\n".join(f"{json_text(key)}:{values[key]}" for key in sorted(values))
    return f"{{\n{lines}\n}}\n".encode("ascii")


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        DataError: the file is not JSON, or of another format version.
    """
    with report_corrupt(where, REBUILD, problem="not valid JSON"):
        tree = json.loads(data)
    version = tree.get("format") if isinstance(tree, dict) else None
    if version != FORMAT:
        raise DataError(
            f"{where}: format: got {version!r}, want {FORMAT}; use the version of movienet-stream "
            "that wrote it, or rebuild the dataset"
        )
    return dict(tree)


def check_kind(tree: Mapping[str, object], kind: str, where: str) -> None:
    """Raise ``DataError`` unless the file is of ``kind``."""
    if tree.get("kind") != kind:
        raise DataError(f"{where}: kind: got {tree.get('kind')!r}, want {kind!r}")


def take_field(tree: object, key: str, kind: type[T], where: str) -> T:
    """Return a field of a JSON object; raise ``DataError`` unless it is of type ``kind``."""
    value = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        got = repr(value)[:60]
        raise DataError(f"{where}: {key}: got {got}, want {kind.__name__}; corrupt? {REBUILD}")
    return value
