"""One frame shard: the movies of a plan entry, packed into tar, index and sidecar."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from configs.errors import DataError
from sharding.dump.archives import Dump, open_source
from sharding.dump.jpeg import jpeg_defect
from sharding.dump.sources import Image, MovieSource, TarSource
from sharding.format import tar
from sharding.format.index import FrameIndex
from sharding.format.manifest import Rejected, Sidecar
from sharding.format.plan import Plan, PlannedMovie
from sharding.shard import PIECE_BYTES, Content, TarWriter, commit_shard, tar_writer
from sharding.storage.base import Storage
from sharding.workers import OnProgress

Judge = Callable[[memoryview], str | None]
"""Says what is wrong with the bytes of an image."""


def build_shard(
    storage: Storage,
    dump: Dump,
    plan: Plan,
    number: int,
    *,
    max_bad_fraction: float,
    cache: Storage | None = None,
    on_progress: OnProgress = lambda _: None,
) -> Sidecar:
    """Build one shard: tar, index, sidecar. Whatever stood there is replaced.

    Args:
        storage: Where the frame set lies.
        dump: The dump.
        plan: The plan; its stamps must still hold.
        number: Of the shard.
        max_bad_fraction: Share of a movie's images that may be left out.
        cache: Where listings of large archives are kept; default: with the frame set.
        on_progress: Called after each piece with the ``images`` and ``bytes`` that were read, and
            after each of the ``movies``.

    Raises:
        DataError: a source changed or is damaged, or a movie has too many bad images.
        OSError: a source cannot be read, or the shard cannot be written.
    """
    planned = plan.shards[number]
    packed = _Packed()
    with tar_writer(storage, "frames", number) as (writer, digest):
        packer = _Packer(writer, packed, _judge(plan), on_progress)
        for position, movie in enumerate(planned):
            with open_source(dump, movie.source, cache or storage) as source:
                _check_stamp(dump, movie, source)
                bad = packer.pack(position, movie.movie, source)
                n_images = len(source.images)
            _check_bad(movie, bad, n_images, max_bad_fraction)
            on_progress({"movies": 1})
    index = packed.index()
    content = Content(
        samples=len(index),
        movies=tuple(movie.movie for movie in planned),
        input_digest=plan.input_digest(number),
        statistics={
            "images": np.bincount(index.movie, minlength=len(planned)).tolist(),
            "image_bytes": int(index.size.sum(dtype=np.uint64)),
            "bad": packed.bad,
        },
        rejected=tuple(packed.rejected),
    )
    return commit_shard(storage, "frames", number, digest, content, index.to_bytes())


class _Packed:
    """What is known of a shard while it grows; 22 bytes an image."""

    def __init__(self) -> None:
        self.offset, self.size, self.movie = array("Q"), array("I"), array("I")
        self.shot, self.image = array("i"), array("h")
        self.rejected: list[Rejected] = []
        self.bad = 0

    def add(self, offset: int, position: int, image: Image) -> None:
        self.offset.append(offset)
        self.size.append(image.size)
        self.movie.append(position)
        self.shot.append(image.shot)
        self.image.append(image.image)

    def index(self) -> FrameIndex:
        return FrameIndex(
            offset=np.array(self.offset, np.uint64),
            size=np.array(self.size, np.uint32),
            movie=np.array(self.movie, np.uint32),
            shot=np.array(self.shot, np.int32),
            image=np.array(self.image, np.int16),
        )


@dataclass
class _Packer:
    """Copies images into a shard."""

    writer: TarWriter
    packed: _Packed
    judge: Judge
    on_progress: OnProgress
    images: int = 0
    """Not told yet, like ``n_bytes``: news of every image would cost more than the image."""

    n_bytes: int = 0

    def pack(self, position: int, movie: str, source: MovieSource) -> int:
        """Copy one movie's good images; return how many were bad."""
        before = self.packed.bad
        for row in _rows(source):
            self._pack_row(position, movie, source, row)
        self._tell_all()
        self.packed.rejected += [Rejected(movie, odd.member, odd.reason) for odd in source.odd]
        return self.packed.bad - before

    def _pack_row(
        self, position: int, movie: str, source: MovieSource, row: Sequence[Image]
    ) -> None:
        """Read images that lie in a row at once, as they will lie in the shard if all are good."""
        begin = row[0].offset
        whole = self.writer.reserve(row[-1].offset + row[-1].size - begin)
        told = source.read_into(row[0], whole)
        moved = False
        for image in row:
            content = whole[image.offset - begin :][: image.size]
            why = told or self.judge(content)
            if why is not None:
                self.packed.rejected.append(Rejected(movie, image.name, why))
                self.packed.bad += 1
                moved = True
                continue
            if moved:
                self.writer.reserve(image.size)[:] = content
            offset = self.writer.commit(f"{movie}/{image.member}", image.size)
            self.packed.add(offset, position, image)
        self.images += len(row)
        self.n_bytes += sum(image.size for image in row)
        if self.n_bytes >= PIECE_BYTES:
            self._tell_all()

    def _tell_all(self) -> None:
        self.on_progress({"images": self.images, "bytes": self.n_bytes})
        self.images = self.n_bytes = 0


def _rows(source: MovieSource) -> Iterator[list[Image]]:
    """Yield images in order; those that follow each other in a tar as a shard has them, together.

    One read then takes some hundred images, and they are where they belong.
    """
    row: list[Image] = []
    joinable = isinstance(source, TarSource)
    for image in source.images:
        if row:
            last = row[-1]
            follows = last.offset + last.size + tar.padding(last.size) + tar.BLOCK == image.offset
            fits = image.offset + image.size - row[0].offset <= PIECE_BYTES - 2 * tar.BLOCK
            if not (joinable and follows and fits):
                yield row
                row = []
        row.append(image)
    if row:
        yield row


def _judge(plan: Plan) -> Judge:
    if plan.image_check == "markers":
        return jpeg_defect
    from sharding.dump.jpeg import undecodable

    return lambda jpeg: jpeg_defect(jpeg) or undecodable(jpeg)


def _check_stamp(dump: Dump, movie: PlannedMovie, source: MovieSource) -> None:
    if source.fingerprint != movie.fingerprint:
        raise DataError(
            f"{dump / movie.source}: changed since it was planned "
            f"({len(source.images)} images now, {movie.images} then); run plan --replace"
        )


def _check_bad(movie: PlannedMovie, bad: int, n_images: int, max_bad_fraction: float) -> None:
    if bad > max_bad_fraction * n_images:
        raise DataError(
            f"movie {movie.movie}: got {bad} bad of {n_images} images, want at most "
            f"{max_bad_fraction:.1%} (sharding.max_bad_fraction); repair {movie.source}, "
            "or allow more"
        )
