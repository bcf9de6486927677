"""Building of one frame shard: tar, index and sidecar of the movies of a plan entry."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from configs.errors import DataError
from configs.runtime.hints import hint
from sharding.dump.archives import Dump, open_source
from sharding.dump.jpeg import jpeg_defect
from sharding.dump.sources import Image, MovieSource, TarSource, lost_images
from sharding.format import tar
from sharding.format.index import FrameIndex
from sharding.format.manifest import Rejected, Sidecar
from sharding.format.plan import Plan, PlannedMovie
from sharding.shard import PIECE_BYTES, Content, TarWriter, commit_shard, tar_writer
from sharding.storage.base import Storage
from sharding.workers import OnProgress

ImageCheck = Callable[[memoryview], str | None]
"""Returns the defect of an image, None for a valid one."""


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
    """Build one shard: tar, index, sidecar. An existing shard is replaced.

    Args:
        storage: Storage of the frame set.
        dump: The dump.
        plan: The plan; the sources must still have its fingerprints.
        number: Shard number.
        max_bad_fraction: Fraction of a movie's images that may be rejected.
        cache: Storage that caches listings of large archives; default: that of the frame set.
        on_progress: Called with the ``images`` and ``bytes`` read since the last call, rejected
            images included, and after each of the ``movies``.

    Raises:
        DataError: a source changed or is corrupt, or a movie has too many bad images.
        OSError: a source cannot be read, or the shard cannot be written.
    """
    planned = plan.shards[number]
    packed = _Packed()
    with tar_writer(storage, "frames", number) as (writer, digest):
        packer = _Packer(writer, packed, _image_check(plan), on_progress)
        for position, movie in enumerate(planned):
            with open_source(
                dump, movie.source, cache or storage, on_shot=lambda: on_progress({})
            ) as source:
                _check_fingerprint(dump, movie, source)
                bad = packer.pack(position, movie.movie, source)
                n_images = len(source.images) + lost_images(source)
            # Raises inside ``tar_writer``, which then publishes nothing.
            _check_bad(movie, bad, n_images, max_bad_fraction)
            on_progress({"movies": 1})
    index = packed.index()
    content = Content(
        samples=len(index),
        movies=tuple(movie.movie for movie in planned),
        input_digest=plan.input_digest(number),
        statistics={
            # One entry per movie, also for one whose images are all rejected.
            "images": np.bincount(index.movie, minlength=len(planned)).tolist(),
            "image_bytes": int(index.size.sum(dtype=np.uint64)),
            "bad": packed.bad,
        },
        rejected=tuple(packed.rejected),
    )
    return commit_shard(storage, "frames", number, digest, content, index.to_bytes())


class _Packed:
    """Index and rejected images of a shard while it grows."""

    def __init__(self) -> None:
        # Packed columns of 22 bytes per image: lists of objects would exceed the memory limit.
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
    image_check: ImageCheck
    on_progress: OnProgress
    images: int = 0
    """Not reported yet, like ``n_bytes``: an update per image would cost more than the image."""

    n_bytes: int = 0

    def pack(self, position: int, movie: str, source: MovieSource) -> int:
        """Copy one movie's good images; return how many were bad or could not be read."""
        before = self.packed.bad
        for run in _runs(source):
            self._pack_run(position, movie, source, run)
        self._report()
        self.packed.rejected += [
            Rejected(movie, skipped.member, skipped.reason) for skipped in source.skipped
        ]
        self.packed.bad += lost_images(source)
        return self.packed.bad - before

    def _pack_run(
        self, position: int, movie: str, source: MovieSource, run: Sequence[Image]
    ) -> None:
        """Copy consecutive images with one read, into their final positions if all are good."""
        begin = run[0].offset
        buffer = self.writer.reserve(run[-1].offset + run[-1].size - begin)
        read_defect = source.read_into(run[0], buffer)
        moved = False
        for image in run:
            content = buffer[image.offset - begin :][: image.size]
            defect = read_defect or self.image_check(content)
            if defect is not None:
                self.packed.rejected.append(Rejected(movie, image.name, defect))
                self.packed.bad += 1
                moved = True
                continue
            # After a rejected image the rest of the run moves forward in the buffer.
            if moved:
                self.writer.reserve(image.size)[:] = content
            offset = self.writer.commit(f"{movie}/{image.member}", image.size)
            self.packed.add(offset, position, image)
        self.images += len(run)
        self.n_bytes += sum(image.size for image in run)
        if self.n_bytes >= PIECE_BYTES:
            self._report()

    def _report(self) -> None:
        self.on_progress({"images": self.images, "bytes": self.n_bytes})
        self.images = self.n_bytes = 0


def _runs(source: MovieSource) -> Iterator[list[Image]]:
    """Yield images in order, grouped into runs with the same spacing in the source as in a shard.

    A run of some hundred images takes one read, and no image has to be moved afterwards.
    """
    run: list[Image] = []
    is_tar = isinstance(source, TarSource)
    for image in source.images:
        if run:
            last = run[-1]
            follows = last.offset + last.size + tar.padding(last.size) + tar.BLOCK == image.offset
            # With header and padding, a run must fit in one buffer of the writer.
            fits = image.offset + image.size - run[0].offset <= PIECE_BYTES - 2 * tar.BLOCK
            if not (is_tar and follows and fits):
                yield run
                run = []
        run.append(image)
    if run:
        yield run


def _image_check(plan: Plan) -> ImageCheck:
    if plan.image_check == "markers":
        return jpeg_defect
    from sharding.dump.jpeg import undecodable

    # The cheap check first; it also names the most frequent defects.
    return lambda jpeg: jpeg_defect(jpeg) or undecodable(jpeg)


def _check_fingerprint(dump: Dump, movie: PlannedMovie, source: MovieSource) -> None:
    if source.fingerprint != movie.fingerprint:
        raise DataError(
            f"{dump / movie.source}: changed since it was planned "
            f"({len(source.images)} images now, {movie.images} then); "
            f"run {hint('movienet-shard plan --replace')}"
        )


def _check_bad(movie: PlannedMovie, bad: int, n_images: int, max_bad_fraction: float) -> None:
    if bad > max_bad_fraction * n_images:
        raise DataError(
            f"movie {movie.movie}: got {bad} bad of {n_images} images, want at most "
            f"{max_bad_fraction:.1%} (sharding.max_bad_fraction); repair {movie.source} ("
            f"{hint('movienet-shard check --decode')} names them), or raise the limit"
        )
