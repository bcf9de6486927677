"""Files that can be read at any offset, without unpacking anything.

    LocalFile   a file, or its parts as if they were joined
    Section     a byte range of another file, e.g. a stored member of a zip
    Inflated    a gzip or deflate stream, which is read forward; a jump back starts at a mark

Each is a ``Readable`` and hides what it reads from.
"""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from configs.errors import DataError
from configs.runtime.files import open_regular
from sharding.storage.open_files import OpenFiles

RAW_DEFLATE = -zlib.MAX_WBITS
GZIP = zlib.MAX_WBITS | 16

_PACKED_BYTES = 64 * 1024
_CHUNK_BYTES = 1024**2
_MARK_BYTES = 8 * 1024**2
"""Bytes between two marks of a stream; each takes about 50 kB, mostly deflate's window."""


class Readable(ABC):
    """A file read by offset; also the sequential reads that ``tar.members`` needs."""

    where: str
    """Name for error messages."""

    _at = 0

    @abstractmethod
    def pread(self, at: int, length: int) -> bytes:
        """Return bytes; fewer only at the end."""

    @abstractmethod
    def pread_into(self, at: int, buffer: memoryview) -> int:
        """Fill ``buffer``; return the number of bytes, fewer only at the end."""

    @abstractmethod
    def end(self) -> int:
        """Return the size in bytes; a stream must be read to its end for this."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a text that changes when the underlying file changes."""

    @abstractmethod
    def close(self) -> None:
        """Close the underlying files."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position of ``read``, from the start or, with ``SEEK_END``, from the end."""
        self._at = offset + (self.end() if whence == os.SEEK_END else 0)
        return self._at

    def read(self, size: int, /) -> bytes:
        """Return the next bytes; fewer only at the end."""
        data = self.pread(self._at, size)
        self._at += len(data)
        return data


class LocalFile(Readable):
    """A file on disk, or its parts as if they were joined."""

    def __init__(self, where: str, paths: Sequence[Path]) -> None:
        self.where = where
        self._paths = tuple(map(str, paths))
        # An archive may have more parts than this process may open files.
        self._files = OpenFiles(Path(), lambda path: open_regular(Path(path)))
        try:
            sizes = [status.st_size for status in self._statuses()]
        except BaseException:
            self.close()
            raise
        self._starts = [0, *accumulate(sizes)]

    def pread(self, at: int, length: int) -> bytes:
        """Return bytes; fewer only at the end."""
        pieces: list[bytes] = []
        while length > 0 and at < self._starts[-1]:
            k, begin, part_length = self._place(at, length)
            with self._part(k) as handle:
                piece = os.pread(handle, part_length, begin)
            if not piece:
                break
            pieces.append(piece)
            at, length = at + len(piece), length - len(piece)
        return b"".join(pieces)

    def pread_into(self, at: int, buffer: memoryview) -> int:
        """Fill ``buffer``; return the number of bytes, fewer only at the end."""
        done = 0
        while done < len(buffer) and at + done < self._starts[-1]:
            k, begin, length = self._place(at + done, len(buffer) - done)
            with self._part(k) as handle:
                got = os.preadv(handle, [buffer[done : done + length]], begin)
            if got == 0:
                break
            done += got
        return done

    def end(self) -> int:
        """Return the total size of the parts."""
        return self._starts[-1]

    def fingerprint(self) -> str:
        """Return size and modification time of each part."""
        return ",".join(f"{status.st_size}:{status.st_mtime_ns}" for status in self._statuses())

    def close(self) -> None:
        """Close the parts."""
        self._files.close()

    def _statuses(self) -> Iterator[os.stat_result]:
        for k in range(len(self._paths)):
            with self._part(k) as handle:
                yield os.fstat(handle)

    @contextmanager
    def _part(self, k: int) -> Iterator[int]:
        file = self._files.take(self._paths[k])
        try:
            yield file.handle
        except OSError as error:
            error.filename = self._paths[k]  # not set by a read by handle
            raise
        finally:
            self._files.release(file)

    def _place(self, at: int, length: int) -> tuple[int, int, int]:
        """Return the part that contains a byte, the offset in it, and the length to read."""
        # Of equal starts bisect_right takes the last, so empty parts are skipped.
        k = bisect_right(self._starts, at) - 1
        return k, at - self._starts[k], min(length, self._starts[k + 1] - at)


class Section(Readable):
    """A byte range of another file; closing it closes that file."""

    def __init__(self, where: str, base: Readable, begin: int, size: int, fingerprint: str) -> None:
        self.where = where
        self._base, self._begin, self._size = base, begin, size
        self._fingerprint = fingerprint

    def pread(self, at: int, length: int) -> bytes:
        """Return bytes; fewer only at the end."""
        length = min(length, self._size - at)
        return self._base.pread(self._begin + at, length) if length > 0 else b""

    def pread_into(self, at: int, buffer: memoryview) -> int:
        """Fill ``buffer``; return the number of bytes, fewer only at the end."""
        length = max(0, min(len(buffer), self._size - at))
        return self._base.pread_into(self._begin + at, buffer[:length])

    def end(self) -> int:
        """Return the size in bytes."""
        return self._size

    def fingerprint(self) -> str:
        """Return the fingerprints of the underlying file and of this range."""
        return f"{self._base.fingerprint()};{self._fingerprint}"

    def close(self) -> None:
        """Close the underlying file."""
        self._base.close()


class _Mark(NamedTuple):
    """A position from which a stream can be inflated."""

    out: int
    packed: int
    decoder: zlib._Decompress


class Inflated(Readable):
    """A gzip or deflate stream.

    Sequential reads inflate it once. Marks at regular distances store the decoder's state, so that
    a jump back inflates a few megabytes, not the complete stream.
    """

    def __init__(self, where: str, base: Readable, wbits: int) -> None:
        self.where = where
        self._base, self._wbits = base, wbits
        self._decoder = zlib.decompressobj(wbits)
        self._marks = [_Mark(0, 0, self._decoder.copy())]
        self._packed = 0  # next compressed byte to decode
        self._out = 0  # first byte of the chunk, in the inflated stream
        self._chunk = b""
        self._size: int | None = None

    def pread(self, at: int, length: int) -> bytes:
        """Return bytes; fewer only at the end.

        Raises:
            DataError: the stream is truncated or corrupt.
        """
        buffer = bytearray(length)
        return bytes(buffer[: self.pread_into(at, memoryview(buffer))])

    def pread_into(self, at: int, buffer: memoryview) -> int:
        """Fill ``buffer``; return the number of bytes, fewer only at the end.

        Raises:
            DataError: the stream is truncated or corrupt.
        """
        self._go_to(at)
        done = 0
        while done < len(buffer):
            start = at + done - self._out
            piece = self._chunk[start : start + len(buffer) - done]
            if piece:
                buffer[done : done + len(piece)] = piece
                done += len(piece)
            elif not self._advance():
                break
        return done

    def end(self) -> int:
        """Return the inflated size; the stream is read to its end for this."""
        while self._size is None:
            self._go_to(self._marks[-1].out)
            while self._advance():
                pass
        return self._size

    def fingerprint(self) -> str:
        """Return the fingerprint of the compressed file."""
        return self._base.fingerprint()

    def close(self) -> None:
        """Close the underlying file."""
        self._base.close()

    def _go_to(self, at: int) -> None:
        """Inflate up to the chunk that contains ``at``, from here or from the nearest mark."""
        mark = self._marks[bisect_right(self._marks, at, key=lambda mark: mark.out) - 1]
        # Continue from the current chunk, unless the position is before it or a mark is closer.
        if not self._out <= at or mark.out > self._out + len(self._chunk):
            self._decoder = mark.decoder.copy()
            self._packed, self._out, self._chunk = mark.packed, mark.out, b""
        while self._out + len(self._chunk) <= at and self._advance():
            pass

    def _advance(self) -> bool:
        """Inflate the next chunk; return whether there was one."""
        self._out += len(self._chunk)
        self._chunk = b""
        # Only beyond the last mark: after a jump back, the marks ahead exist already.
        if self._out >= self._marks[-1].out + _MARK_BYTES and not self._decoder.eof:
            self._marks.append(_Mark(self._out, self._packed, self._decoder.copy()))
        while not self._chunk:
            if self._decoder.eof and not self._next_stream():
                self._size = self._out
                return False
            packed = self._base.pread(self._packed, _PACKED_BYTES)
            try:
                self._chunk = self._decoder.decompress(packed, _CHUNK_BYTES)
            except zlib.error as error:
                raise DataError(
                    f"{self.where}: corrupt at compressed byte {self._packed} ({error}); "
                    "copy it again"
                ) from None
            # Input that was not consumed is read again, so that a mark only needs an offset.
            unused = len(self._decoder.unconsumed_tail) + len(self._decoder.unused_data)
            self._packed += len(packed) - unused
            if not packed and not self._chunk and not self._decoder.eof:
                raise DataError(
                    f"{self.where}: got {self._base.end()} compressed bytes, want more: the "
                    "stream is truncated; resume the download (`curl -C -`, `wget -c`)"
                )
        return True

    def _skip_zeros(self) -> bool:
        """Skip zero bytes, with which some programs fill a block; return whether others follow."""
        while data := self._base.pread(self._packed, _PACKED_BYTES):
            rest = data.lstrip(b"\0")
            self._packed += len(data) - len(rest)
            if rest:
                return True
        return False

    def _next_stream(self) -> bool:
        """Start the next member of a gzip file; return False after the last one."""
        # gzip files may be concatenated; a deflated member of a zip is one stream.
        if self._wbits != GZIP or not self._skip_zeros():
            return False
        if self._base.pread(self._packed, 2) != b"\x1f\x8b":
            raise DataError(
                f"{self.where}: got {self._base.end() - self._packed} bytes after the end of the "
                "gzip stream, want none, or another stream; copy it again, or cut it: "
                f"`truncate -s {self._packed}`"
            )
        self._decoder = zlib.decompressobj(self._wbits)
        return True
