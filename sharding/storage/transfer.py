"""Transfers of bytes: parts of a file, bodies received into buffers, and their progress."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from sharding.storage.responses import InvalidResponseError, check_length

T = TypeVar("T")
PART_BYTES = 8 * 1024**2
"""A larger file is uploaded in parts of this size, through a temporary file."""


@dataclass
class Progress:
    """Number of chunks or parts that a transfer has completed."""

    done: int = 0
    """In the current attempt."""

    furthest: int = 0
    """In the attempt that came furthest."""

    def watch(self, parts: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the parts of an upload; each counts once the uploader takes it."""
        for number, part in enumerate(parts, 1):
            self.done, self.furthest = number, max(self.furthest, number)
            yield part


async def wait_unless_stalled(
    attempt: Awaitable[T], silence: float, progress: Progress | None, deadline: float
) -> T:
    """Wait for an attempt while it progresses.

    Args:
        attempt: One request.
        silence: Seconds without progress after which it is cancelled.
        progress: Progress of the attempt; None: it reports none before it ends.
        deadline: Time of the loop's clock at which it is cancelled in any case.

    Raises:
        TimeoutError: the attempt made no progress for ``silence`` seconds, or the deadline passed.
    """
    clock = asyncio.get_running_loop().time
    task = asyncio.ensure_future(attempt)
    try:
        while True:
            seen = progress.done if progress else 0
            done, _ = await asyncio.wait({task}, timeout=max(min(silence, deadline - clock()), 0.0))
            if done:
                return task.result()
            if progress is None or progress.done == seen or clock() >= deadline:
                raise TimeoutError
    finally:
        task.cancel()


async def receive(chunks: AsyncIterator[bytes], view: memoryview, progress: Progress) -> None:
    """Fill ``view`` with a body, chunk by chunk: a slow connection is not a stalled one.

    Raises:
        InvalidResponseError: the body has another length.
    """
    end = 0
    async for chunk in chunks:
        data = memoryview(chunk)  # obstore's chunks are buffers, not bytes
        if end + len(data) > len(view):
            raise InvalidResponseError(f"got a body of more than {len(view)} bytes")
        view[end : end + len(data)] = data
        end += len(data)
        progress.done += 1
    check_length(end, len(view))


def file_parts(handle: int, size: int) -> Iterator[bytes]:
    """Yield an open file part by part; concurrent attempts may read the same file."""
    for offset in range(0, size, PART_BYTES):
        yield os.pread(handle, PART_BYTES, offset)
