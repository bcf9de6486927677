"""Key frames of a video: three JPEGs per shot, as in MovieNet, extracted in one pass.

The frames of the current shot are kept until its end is known, at most 64 MiB of them: of a longer
shot every second, fourth, … frame. So memory does not depend on the video.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import simplejpeg

from configs.errors import DataError
from configs.runtime.hints import hint
from sharding.dump.shot_detection import DetectorName, ShotDetector, make_detector
from sharding.dump.sources import Image, SkippedMember
from sharding.dump.video import Frame, read_frames, read_header
from sharding.format.encoding import sha256_hex
from sharding.format.names import frame_name

FRACTIONS = (0.25, 0.5, 0.75)
"""Positions of the key frames within a shot."""

QUALITY = 90
"""Of the JPEGs, with halved colour resolution."""

_VERSION = 1
"""Of the extraction; part of the fingerprint, so that other key frames are another source."""

_KEPT_BYTES = 64 * 1024**2
_MIN_KEPT, _MAX_KEPT = 8, 512

_BYTES_PER_S = 20_000
"""Estimate of the key frames' size, for the plan: three of 20 kB per shot of three seconds."""


class KeyFrame(NamedTuple):
    """One key frame."""

    image: int
    """Number within the shot, from 0."""

    time_s: float
    jpeg: bytes


@dataclass(frozen=True)
class Shot:
    """One shot with its key frames: three, fewer if the shot has fewer frames."""

    number: int
    begin_s: float
    end_s: float
    images: tuple[KeyFrame, ...]


def read_shots(path: Path, detector: DetectorName = "pyscenedetect") -> Iterator[Shot]:
    """Yield the shots of a video in order.

    Raises:
        DataError: the file is no video, truncated or corrupt, or exceeds a limit.
        MachineError: a library is not installed.
        OSError: the file cannot be read.
    """
    rate = read_header(path).frames_per_second
    return _Splitter(make_detector(detector, rate), 1 / rate).shots(read_frames(path))


def estimated_bytes(path: Path) -> int:
    """Return about how many bytes the key frames of a video will have, from its header."""
    return max(1, int(_BYTES_PER_S * read_header(path).duration_s))


def video_fingerprint(path: Path) -> str:
    """Return a text that changes when the file or the extraction changes."""
    stat = path.stat()
    return sha256_hex(f"{stat.st_size}:{stat.st_mtime_ns} key frames {_VERSION}".encode("ascii"))


class _Splitter:
    """Division of a stream of frames into shots."""

    def __init__(self, detector: ShotDetector, frame_s: float) -> None:
        self._detector, self._frame_s = detector, frame_s
        self._recent: deque[Frame] = deque()
        """Frames that may belong to the next shot: the detector reports cuts late."""

        self._first = 0  # number of the first recent frame
        self._kept = _Kept()
        self._number = 0

    def shots(self, frames: Iterator[Frame]) -> Iterator[Shot]:
        end_s = 0.0
        for frame in frames:
            end_s = frame.time_s + self._frame_s
            self._recent.append(frame)
            for cut in self._detector.add(
                frame.bgr(*self._detector.size(frame.picture.height, frame.picture.width))
            ):
                yield self._cut(cut)
            if len(self._recent) > self._detector.delay:
                self._keep()
        for cut in self._detector.finish():
            yield self._cut(cut)
        while self._recent:
            self._keep()
        yield self._shot(end_s)

    def _cut(self, number: int) -> Shot:
        while self._first < number:
            self._keep()
        return self._shot(self._recent[0].time_s)

    def _keep(self) -> None:
        self._kept.add(self._recent.popleft())
        self._first += 1

    def _shot(self, end_s: float) -> Shot:
        begin_s, images = self._kept.begin_s, tuple(self._kept.key_frames())
        self._kept = _Kept()
        self._number += 1
        return Shot(self._number - 1, begin_s, end_s, images)


class _Kept:
    """Frames of one shot: all of them, or every n-th of a long one."""

    def __init__(self) -> None:
        self.begin_s = 0.0
        self._frames: list[Frame] = []
        self._stride, self._count = 1, 0

    def add(self, frame: Frame) -> None:
        if self._count == 0:
            self.begin_s = frame.time_s
        if self._count % self._stride == 0:
            self._frames.append(frame)
        self._count += 1
        limit = max(_MIN_KEPT, min(_MAX_KEPT, _KEPT_BYTES // frame.n_bytes))
        if len(self._frames) > limit:
            self._frames = self._frames[::2]
            self._stride *= 2

    def key_frames(self) -> Iterator[KeyFrame]:
        places = [int(self._count * fraction) // self._stride for fraction in FRACTIONS]
        # A shot of one or two frames has as many key frames.
        for image, place in enumerate(dict.fromkeys(places)):
            frame = self._frames[place]
            yield KeyFrame(image, frame.time_s, _jpeg(frame))


def _jpeg(frame: Frame) -> bytes:
    data: bytes = simplejpeg.encode_jpeg(frame.rgb(), quality=QUALITY, colorsubsampling="420")
    return data


class VideoSource:
    """One movie as a video. Its key frames are extracted to a temporary file when it is opened.

    Args:
        path: The video.
        on_shot: Called after each shot; may raise an error to stop.
        detector: Detector of the shots.
    """

    joined = 0
    skipped: tuple[SkippedMember, ...] = ()

    def __init__(
        self,
        path: Path,
        on_shot: Callable[[], None] = lambda: None,
        detector: DetectorName = "pyscenedetect",
    ) -> None:
        self._path, self._detector = path, detector
        self.spans: list[tuple[float, float]] = []
        """Begin and end of each shot in seconds."""

        self.times_s: list[float] = []
        """Time of each image."""

        self.fingerprint = video_fingerprint(path)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the source
        try:
            self.images = tuple(self._extract(on_shot))
        except BaseException as error:
            with suppress(OSError):  # closing writes what is buffered, to a disk that may be full
                self._file.close()
            if isinstance(error, OSError) and error.filename is None:
                error.filename = tempfile.gettempdir()  # set TMPDIR to another disk
            raise

    def _extract(self, on_shot: Callable[[], None]) -> Iterator[Image]:
        offset = 0
        for shot in read_shots(self._path, self._detector):
            self.spans.append((shot.begin_s, shot.end_s))
            for image, time_s, jpeg in shot.images:
                self.times_s.append(time_s)
                self._file.write(jpeg)
                name = frame_name(shot.number, image)
                yield Image(shot.number, image, name, len(jpeg), offset, 0)
                offset += len(jpeg)
            on_shot()
        self._file.flush()

    def read_into(self, image: Image, buffer: memoryview) -> str | None:
        """Fill ``buffer`` with the bytes of an image."""
        os.preadv(self._file.fileno(), [buffer], image.offset)
        return None

    def close(self) -> None:
        """Delete the key frames.

        Raises:
            DataError: the video changed while it was read.
        """
        self._file.close()
        if video_fingerprint(self._path) != self.fingerprint:
            remedy = hint("movienet-shard plan --replace")
            raise DataError(
                f"{self._path}: changed while it was read; wait until it is complete, run {remedy}"
            )
