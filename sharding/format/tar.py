"""The bytes of tars; no other module depends on them.

Tars are written as plain ustar, with the same bytes on every machine: mode 0644, user and group 0
without names, time 0. Existing tars may be ustar, GNU or pax.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from configs.errors import DataError

BLOCK = 512
"""Headers and contents begin at multiples of this many bytes."""

RECORD = 10_240
"""The size of a tar is a multiple of this, as with GNU tar."""

NAME_BYTES = 100
"""Longest name of a member; a longer one would need a second header."""

MAX_SIZE = 8 * 1024**3 - 1
"""Largest member whose size fits into eleven octal digits."""

MAX_LISTED_SIZE = 2**60
"""Largest member that is listed; a header with a larger size is corrupt."""

_CHECKSUM = slice(148, 156)
_FILE_KINDS = (b"0", b"\0", b"7")
_SPECIAL_BYTES = 1 << 20
_ZERO_BYTES = 1 << 20
_DIGITS = 20
_ADLER = 65_521


def _template() -> bytes:
    block = bytearray(BLOCK)
    block[100:108] = b"0000644\0"
    block[108:116] = block[116:124] = b"0000000\0"
    block[124:136] = block[136:148] = b"00000000000\0"
    block[_CHECKSUM] = b" " * 8
    block[156:157] = b"0"
    block[257:265] = b"ustar\x0000"
    block[329:337] = block[337:345] = b"0000000\0"
    return bytes(block)


_TEMPLATE = _template()
# The size is eleven zeros in the template; its actual digits are added instead.
_TEMPLATE_SUM = sum(_TEMPLATE) - 11 * ord("0")


def header(name: str, size: int) -> bytes:
    """Return the 512-byte header of a member.

    Raises:
        ValueError: the name is empty, not ASCII or above 100 bytes, or the size is above 8 GiB.
    """
    raw, digits = name.encode("ascii"), b"%011o" % size
    if not 0 < len(raw) <= NAME_BYTES or not 0 <= size <= MAX_SIZE:
        raise ValueError(
            f"tar member {name!r} of {size} bytes: want a name of 1 to 100 bytes, <8 GiB"
        )
    block = bytearray(_TEMPLATE)
    block[: len(raw)] = raw
    block[124:135] = digits
    block[_CHECKSUM] = b"%06o\0 " % (_TEMPLATE_SUM + sum(raw) + sum(digits))
    return bytes(block)


def padding(size: int) -> int:
    """Return the number of zero bytes that follow a content of ``size`` bytes."""
    return -size % BLOCK


def end(n_bytes: int) -> bytes:
    """Return the end of a tar of ``n_bytes`` so far: two zero blocks, padded to a full record."""
    return bytes(2 * BLOCK + -(n_bytes + 2 * BLOCK) % RECORD)


class Seekable(Protocol):
    """A file whose members can be listed."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Set the position; return it."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes; fewer only at the end."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an existing tar."""

    name: str
    """As stored: it may be absolute, contain ``..`` or be no path at all."""

    offset: int
    """First byte of the content."""

    size: int
    kind: str
    """``file``, ``folder``, ``hard link`` or ``other``."""

    start: int = 0
    """First byte of its headers."""

    link: str = ""
    """Name of the member that a hard link refers to."""

    @property
    def end(self) -> int:
        """First byte after its padding: where the next member starts."""
        return self.offset + self.size + padding(self.size)


def members(
    file: Seekable, where: str, *, start: int = 0, stop: int | None = None
) -> Iterator[Member]:
    """Yield the members of a tar; contents are skipped by seeking.

    Tars joined by ``cat`` are read one after the other. The first member of each further tar starts
    after the end of the member before it, not at it.

    Args:
        file: Readable and seekable.
        where: Name of the tar for errors.
        start: First byte of the first header.
        stop: First byte after the last member to yield; None: yield all members.

    Raises:
        DataError: a header is corrupt, the tar is truncated, or it is followed by bytes that are
            not another tar.
    """
    at, first, changes = start, start, dict[str, str]()
    while stop is None or at < stop:
        block = _read_at(file, at, BLOCK, where)
        if not any(block):
            begin = _next_tar(file, at, where)
            if begin is None:
                return
            at, first, changes = begin, begin, {}
            continue
        kind, length = _kind_and_size(block, at, where)
        content = at + BLOCK
        # pax and GNU headers change path or size of the next member. Extremely long ones are listed
        # as members, not read into memory.
        if kind in (b"x", b"L", b"K") and length <= _SPECIAL_BYTES:
            changes |= _special(kind, _read_at(file, content, length, where), at, where)
        elif kind not in (b"g", b"K"):
            length = int(changes.get("size", length)) if kind in _FILE_KINDS else length
            name = changes.get("path", _name(block))
            link = changes.get("linkpath", _text(block[157:257])) if kind == b"1" else ""
            yield Member(name, content, length, _kind(kind), first, link)
            first, changes = content + length + padding(length), {}
        at = content + length + padding(length)


def follow_links(
    members: Iterable[Member], files: Callable[[Member], Mapping[str, Sequence[Member]]]
) -> Iterator[Member]:
    """Yield members; a hard link becomes a file with the content of the member it refers to.

    Args:
        members: Members of a tar, in order.
        files: Returns the files among which the target of a link is, as ``by_name`` does. It is
            called for links only, so that a tar without links needs no table.
    """
    for member in members:
        if member.kind == "hard link":
            named = files(member).get(plain_name(member.link), ())
            earlier = [file for file in named if file.start < member.start]
            if earlier:
                target = earlier[-1]
                member = replace(member, kind="file", offset=target.offset, size=target.size)
        yield member


def by_name(members: Iterable[Member]) -> dict[str, list[Member]]:
    """Return the files among members by their plain names; a name may occur several times."""
    files: dict[str, list[Member]] = {}
    for member in members:
        if member.kind == "file":
            files.setdefault(plain_name(member.name), []).append(member)
    return files


def plain_name(name: str) -> str:
    """Return a member's name without ``.`` and repeated slashes; links may omit them."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def is_header(block: bytes, name: str, size: int) -> bool:
    """Return whether ``block`` is exactly the header that ``header`` returns."""
    try:
        return block == header(name, size)
    except (ValueError, UnicodeEncodeError):
        return False


def _next_tar(file: Seekable, at: int, where: str) -> int | None:
    """Return the first byte of the tar that follows zero blocks at ``at``; None at the end."""
    begin = _after_zeros(file, at)
    if begin is None:
        return None
    file.seek(begin)
    try:
        _kind_and_size(file.read(BLOCK).ljust(BLOCK, b"\0"), begin, where)
    except DataError:
        raise DataError(
            f"{where}: got {file.seek(0, 2) - begin} bytes after the end of the tar, want none, or "
            f"another tar; copy it again, or cut it: `truncate -s {begin}`"
        ) from None
    return begin


def _after_zeros(file: Seekable, at: int) -> int | None:
    size = RECORD  # usually the rest of the tar
    while True:
        file.seek(at)
        data = file.read(size)
        if data.count(0) < len(data):
            n_zeros = len(data) - len(data.lstrip(b"\0"))
            return at + n_zeros // BLOCK * BLOCK
        if len(data) < size:
            return None
        at, size = at + size, _ZERO_BYTES


def _read_at(file: Seekable, at: int, length: int, where: str) -> bytes:
    file.seek(at)
    data = file.read(length)
    if len(data) == length:
        return data
    raise DataError(
        f"{where}: got {file.seek(0, 2)} bytes, want at least {at + length}; "
        "the tar is truncated, copy it again"
    )


def _kind_and_size(block: bytes, at: int, where: str) -> tuple[bytes, int]:
    try:
        checksum = _octal(block[_CHECKSUM])
        raw = block[124:136]
        # GNU tar writes large sizes in base 256, marked by the top bit.
        base256 = raw[0] & 0x80
        length = int.from_bytes(raw[1:], "big") if base256 else _octal(raw)
    except ValueError:
        raise _damaged(where, at) from None
    # The low half of Adler-32 is the sum of all bytes, at a fraction of the time of ``sum``.
    total = (zlib.adler32(block, 0) & 0xFFFF) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    if (total - checksum) % _ADLER or not 0 <= length <= MAX_LISTED_SIZE:
        raise _damaged(where, at)
    kind = block[156:157]
    # Links and devices have no content, whatever size their header states.
    return kind, 0 if kind in (b"1", b"2", b"3", b"4", b"5", b"6") else length


def _octal(field: bytes) -> int:
    return int(field.strip(b" \0") or b"0", 8)


def _damaged(where: str, at: int) -> DataError:
    return DataError(f"{where}: damaged header at byte {at}; copy it again if it is a tar at all")


def _name(block: bytes) -> str:
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _kind(kind: bytes) -> str:
    if kind in _FILE_KINDS:
        return "file"
    return {b"1": "hard link", b"5": "folder"}.get(kind, "other")


def _special(kind: bytes, data: bytes, at: int, where: str) -> dict[str, str]:
    if kind != b"x":
        return {"path" if kind == b"L" else "linkpath": _text(data)}
    records: dict[str, str] = {}
    # A pax record is "LENGTH KEY=VALUE\n", and its length includes itself.
    while data:
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < _DIGITS else 0
        key, equals, value = data[len(digits) + 1 : length].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise _damaged(where, at)
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        data = data[length:]
    size = records.get("size", "0")
    if not (size.isascii() and size.isdigit() and len(size) < _DIGITS):
        raise _damaged(where, at)
    if int(size) > MAX_LISTED_SIZE:
        raise _damaged(where, at)
    return {key: value for key, value in records.items() if key in ("path", "linkpath", "size")}
