"""The central directory of a zip, read as a stream: 4.8 million members need no object each.

Nothing is unpacked: a stored member is a byte range of the zip, and a deflated one is inflated when
it is read. Format: PKWARE's APPNOTE 6.3, with zip64.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from configs.errors import DataError

STORED, DEFLATED = 0, 8
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ"}

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LENGTHS = struct.Struct("<3H")
_LENGTHS_AT = 28
_COMMENT_BYTES = 65_535
_CHUNK_BYTES = 1024**2
_MAX_16, _MAX_32 = 0xFFFF, 0xFFFFFFFF
_UTF8 = 0x800
_ENCRYPTED = 0x1
_UNIX = 3
_DEFLATE_RATIO = 1032
"""No deflate stream expands by more than this factor."""


class Bytes(Protocol):
    """A file that is read by offset."""

    def pread(self, at: int, length: int) -> bytes:
        """Return bytes; fewer only at the end."""

    def end(self) -> int:
        """Return the size in bytes."""


class End(NamedTuple):
    """The end record of a zip: where its central directory is."""

    begin: int
    """First byte of the directory in the file."""

    size: int
    entries: int
    shift: int
    """Number of bytes prepended to the zip, which its offsets do not include."""

    @property
    def stop(self) -> int:
        """First byte after the directory."""
        return self.begin + self.size


class Raw(NamedTuple):
    """An entry of the directory, of which only the name is decoded."""

    at: int
    """First byte of the entry in the file."""

    length: int
    """Bytes of the entry."""

    name: bytes
    utf8: bool


class Entry(NamedTuple):
    """An entry of the directory."""

    name: str
    """As stored: it may be absolute, contain ``..`` or be no path at all."""

    kind: str
    """``file``, ``folder`` or ``other``: links, devices."""

    method: int
    encrypted: bool
    crc: int
    packed: int
    """Size in the zip, in bytes."""

    size: int
    """Inflated size, in bytes."""

    header: int
    """First byte of its local header in the file."""

    def defect(self, end: End) -> str | None:
        """Return why the member cannot be read; None if it can."""
        if self.encrypted:
            return "encrypted by a password"
        if self.method not in (STORED, DEFLATED):
            name = _METHODS.get(self.method, "another program")
            return f"packed by {name} (method {self.method}), want stored or deflated"
        # Memory is allocated by the stated size, so a size that cannot be true is refused here.
        most = self.packed * _DEFLATE_RATIO if self.method == DEFLATED else self.packed
        inside = 0 <= self.header <= end.begin - _LOCAL.size - self.packed
        if not inside or not (self.packed if self.method == STORED else 0) <= self.size <= most:
            return "impossible size"
        return None


def find_end(file: Bytes, where: str) -> End:
    """Read the end of a zip.

    Raises:
        DataError: there is no end record (the file is truncated or not a zip), or the zip is split.
    """
    size = file.end()
    tail_at = max(0, size - _END.size - _COMMENT_BYTES)
    tail = file.pread(tail_at, size - tail_at)
    at = _find_end(tail)
    if at < 0:
        is_zip = file.pread(0, 4) == b"PK\3\4"
        what = "the zip is truncated" if is_zip else "not a zip, or truncated"
        raise DataError(
            f"{where}: got {size} bytes and no end record, want the complete file: {what}; "
            "resume the download (`curl -C -`, `wget -c`), and compare the size with the server's"
        )
    _, disk, first_disk, here, entries, length, offset, _ = _END.unpack_from(tail, at)
    end_at = tail_at + at
    if end64 := _end64(file, end_at, where):
        end_at, disk, first_disk, here, entries, length, offset = end64
    if disk or first_disk or here != entries:
        raise several_disks(where, f"the last of {disk + 1} disks")
    # The directory ends at the end record. If that contradicts its offset, bytes were prepended to
    # the zip (a self-extracting one), or some are missing.
    shift = end_at - length - offset
    if shift < 0:
        raise DataError(
            f"{where}: got {size} bytes, want {size - shift}: some are missing inside; "
            "download it again"
        )
    # Some programs write only the lower 32 bits of an offset.
    if shift % (_MAX_32 + 1) and file.pread(0, 4) == b"PK\3\4":
        raise DataError(
            f"{where}: got {shift} bytes of another zip before it, as `cat` joins them, but only "
            f"the last one can be read; separate them: `head -c {shift}` writes the first"
        )
    return End(offset + shift, length, entries, shift)


def several_disks(where: str, what: str) -> DataError:
    """Return the error for a split zip."""
    return DataError(
        f"{where}: {what} of a split zip, want one file: with .z01, .z02 … and .zip in one folder, "
        "run `zip -s 0 NAME.zip --out joined.zip`, then set data.dump to joined.zip"
    )


def read_names(file: Bytes, begin: int, stop: int, where: str) -> Iterator[Raw]:
    """Yield the entries of a byte range of the directory, undecoded; it is read in large pieces.

    Raises:
        DataError: the directory is corrupt.
    """
    for at, length, block, k in _walk(file, begin, stop, where):
        (name_length,) = struct.unpack_from("<H", block, k + _LENGTHS_AT)
        first = k + _ENTRY.size
        yield Raw(at, length, block[first : first + name_length], bool(block[k + 9] & 0x08))


def read_entries(file: Bytes, end: End, begin: int, stop: int, where: str) -> Iterator[Entry]:
    """Yield the entries of a byte range of the directory.

    Raises:
        DataError: the directory is corrupt.
    """
    for at, _, block, k in _walk(file, begin, stop, where):
        yield _entry(block, k, end.shift, where, at)


def content_at(file: Bytes, entry: Entry, where: str) -> int:
    """Return the first byte of a member's content.

    Raises:
        DataError: there is no local header at the offset in the directory.
    """
    block = file.pread(entry.header, _LOCAL.size)
    if len(block) < _LOCAL.size or block[:4] != b"PK\3\4":
        raise DataError(
            f"{where}: no header of {entry.name!r} at byte {entry.header}; the "
            "file is corrupt, download it again"
        )
    *_, name_length, extra_length = _LOCAL.unpack(block)
    return int(entry.header + _LOCAL.size + name_length + extra_length)


def text(name: bytes, *, utf8: bool) -> str:
    """Return a member's name."""
    return name.decode("utf-8", "surrogateescape") if utf8 else name.decode("cp437")


def _find_end(tail: bytes) -> int:
    """Return the offset of the end record in the last bytes of a zip; -1 if there is none.

    The signature alone is no proof: bytes of a stored image, or of the comment, may equal it.
    """
    # A record must fit between its signature and the end of the file.
    stop = max(0, len(tail) - _END.size + 4)
    last, at = -1, tail.rfind(b"PK\5\6", 0, stop)
    while at >= 0:
        _, disk, first_disk, here, entries, *_, comment_bytes = _END.unpack_from(tail, at)
        trailing = len(tail) - at - _END.size - comment_bytes
        # The comment ends exactly with the file: an intact zip. No weaker match may replace it,
        # so the search continues past such matches.
        if trailing == 0:
            return at
        # Bytes follow the comment: something was appended to the zip. Without an exact match the
        # last record counts if it is that of an unsplit zip, which the bytes of an image rarely
        # imitate. A comment that exceeds the file (trailing < 0) is never real.
        if last < 0 < trailing and disk == first_disk == 0 and here == entries:
            last = at
        # The end bound excludes the signature at ``at``, but not one that begins a byte earlier.
        at = tail.rfind(b"PK\5\6", 0, at + 3)
    return last


def _end64(file: Bytes, end_at: int, where: str) -> tuple[int, int, int, int, int, int, int] | None:
    block = file.pread(end_at - _LOCATOR64.size, _LOCATOR64.size) if end_at >= 20 else b""
    if block[:4] != b"PK\6\7":
        return None
    _, _, _, disks = _LOCATOR64.unpack(block)
    if disks > 1:
        raise several_disks(where, f"the last of {disks} disks")
    at = end_at - _LOCATOR64.size - _END64.size
    record = file.pread(at, _END64.size) if at >= 0 else b""
    if record[:4] != b"PK\6\6":
        raise DataError(f"{where}: corrupt zip64 end record; download it again")
    _, _, _, _, disk, first_disk, here, total, length, offset = _END64.unpack(record)
    return at, disk, first_disk, here, total, length, offset


def _walk(file: Bytes, begin: int, stop: int, where: str) -> Iterator[tuple[int, int, bytes, int]]:
    """Yield per entry: its offset in the file, its length, a block, and its offset in the block."""
    # Entries differ in length, so each block starts with the entry that the last one truncated.
    at, block, k = begin, b"", 0
    head, lengths = _ENTRY.size, _LENGTHS
    while at < stop:
        if k + head > len(block):
            block, k = _read(file, at, stop), 0
        if len(block) - k < head or block[k : k + 4] != b"PK\1\2":
            raise _damaged(where, at)
        length = head + sum(lengths.unpack_from(block, k + _LENGTHS_AT))
        if k + length > len(block):
            block, k = _read(file, at, stop), 0
            if length > len(block):
                raise _damaged(where, at)
        yield at, length, block, k
        at, k = at + length, k + length


def _read(file: Bytes, at: int, stop: int) -> bytes:
    return file.pread(at, min(_CHUNK_BYTES, stop - at))


def _entry(block: bytes, k: int, shift: int, where: str, at: int) -> Entry:
    (
        _, made, _, flags, method, _, _, crc, packed, size, n, m, _, _, _, attributes, header,
    ) = _ENTRY.unpack_from(block, k)  # fmt: skip
    first = k + _ENTRY.size
    if _MAX_32 in (size, packed, header):
        # The zip64 field contains only the numbers that do not fit into 32 bits, in this order.
        wide = _wide(block[first + n : first + n + m])
        try:
            size = next(wide) if size == _MAX_32 else size
            packed = next(wide) if packed == _MAX_32 else packed
            header = next(wide) if header == _MAX_32 else header
        except StopIteration:
            raise _damaged(where, at) from None
    name = text(block[first : first + n], utf8=bool(flags & _UTF8))
    mode = attributes >> 16 if made >> 8 == _UNIX else 0
    kind = _kind(name, stat.S_IFMT(mode))
    return Entry(name, kind, method, bool(flags & _ENCRYPTED), crc, packed, size, header + shift)


def _wide(extra: bytes) -> Iterator[int]:
    """Yield the 8-byte numbers of the zip64 field, the sizes and offsets beyond 32 bits."""
    k = 0
    while k + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, k)
        if tag == 1:
            values = extra[k + 4 : k + 4 + length]
            yield from (v for (v,) in struct.iter_unpack("<Q", values[: len(values) // 8 * 8]))
            return
        k += 4 + length


def _kind(name: str, mode: int) -> str:
    # Only zips from Unix contain a mode; in others a folder is known by its final slash.
    if mode == stat.S_IFDIR or (mode in (0, stat.S_IFREG) and name.endswith(("/", "\\"))):
        return "folder"
    return "file" if mode in (0, stat.S_IFREG) else "other"


def _damaged(where: str, at: int) -> DataError:
    return DataError(f"{where}: corrupt directory at byte {at}; download it again")
