"""Frames of a video file, as they would be displayed. The only module that imports PyAV.

A frame is cropped to the picture between letterbox bars, rotated as the file specifies, and scaled
to a height of 240 pixels and the width of its display aspect ratio. Videos are decoded once, from
start to end; only the frames that the caller keeps remain in memory.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from configs.errors import DataError
from configs.runtime.files import open_file
from sharding.dump.jpeg import BadImage, check_size
from sharding.dump.shot_detection import missing_extra
from sharding.dump.tone_mapping import tone_mapped

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Pixels = npt.NDArray[np.uint8]

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"),
    *(".mpg", ".mpeg", ".ts", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp"),
)
"""Suffixes of video files, in lower case."""

HEIGHT = 240
"""Height of a key frame in pixels, as in MovieNet's 240P."""

MAX_DURATION_S = 24 * 3600
"""Longest video that is read, in seconds."""

_MAX_FRAMES = MAX_DURATION_S * 120
_MAX_ASPECT = 16
"""Widest picture, as width divided by height: it limits the memory of a frame."""

_MAX_BAD_FRACTION = 0.01
"""Largest fraction of packets that may fail to decode."""

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf,flv,ogg"
"""Containers that may be opened: none of them refers to other files or to the network."""

_PROBES = 12
"""Frames that are examined for letterbox bars, at equal distances."""

_BLACK = 10
"""Largest mean of a row or column of a bar, of 255: compression adds noise to black."""

_MIN_BAR, _MAX_BAR = 0.01, 0.3
"""Bar at one side, as a fraction of height or width: 2.76:1 in 4:3 has 0.26."""

_FLAGS = "area+accurate_rnd+full_chroma_int+bitexact"
"""Options of the scaler: the same bytes on every processor."""

_THREADS = 1
"""Of conversions: starting threads takes longer than converting a small frame."""

_MATRICES = {1: "bt709", 5: "smpte170m", 6: "smpte170m", 9: "bt2020nc", 10: "bt2020nc"}
"""FFmpeg's numbers of the colour matrices that are distinguished."""

_CURVES = {16: "pq", 18: "hlg"}
"""FFmpeg's numbers of the transfer curves of high dynamic range."""

_FULL_RANGE = 2
_EXCLUDE = "replace the file, or leave the movie out (data.exclude)"


class VideoHeader(NamedTuple):
    """What the header of a video states."""

    duration_s: float
    """0 if it is unknown."""

    frames_per_second: float
    """On average; 25 if it is unknown."""


class Bars(NamedTuple):
    """Pixels to remove at each of the left and right side, and at each of top and bottom."""

    x: int = 0
    y: int = 0


@dataclass(frozen=True)
class Frame:
    """One scaled frame; its pixels are converted when they are needed."""

    time_s: float
    """Since the first frame."""

    picture: VideoFrame

    @property
    def n_bytes(self) -> int:
        """Memory in bytes."""
        return sum(plane.buffer_size for plane in self.picture.planes)

    def bgr(self, height: int, width: int) -> Pixels:
        """Return uint8 ``[height, width, 3]`` in order of blue, green, red."""
        small = self.picture.reformat(
            width, height, format="bgr24", interpolation="AREA", threads=_THREADS
        )
        return _pixels(small)

    def rgb(self) -> Pixels:
        """Return uint8 ``[240, W, 3]``; high dynamic range is mapped to the standard one."""
        curve = _CURVES.get(self.picture.color_trc)
        if curve is None:
            return _pixels(self.picture.reformat(format="rgb24", threads=_THREADS))
        wide = self.picture.reformat(format="rgb48le", threads=_THREADS).to_ndarray()
        return tone_mapped(wide.astype(np.float32) / np.float32(65535), curve)


def _pixels(picture: VideoFrame) -> Pixels:
    pixels: Any = picture.to_ndarray()  # its type depends on the format
    return cast(Pixels, pixels)


def is_video(name: str) -> bool:
    """Return whether a file name has the suffix of a video."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def read_header(path: Path) -> VideoHeader:
    """Read the header of a video; no frame is decoded.

    Raises:
        DataError: the file is no video, has no video stream, or exceeds a limit.
        MachineError: PyAV is not installed.
        OSError: the file cannot be read.
    """
    with _opened(path) as (container, stream):
        return _header(path, container, stream)


def read_frames(path: Path) -> Iterator[Frame]:
    """Yield all frames of a video in order of display.

    Raises:
        DataError: the file is truncated or corrupt, or exceeds a limit.
        MachineError: PyAV is not installed.
        OSError: the file cannot be read.
    """
    bars = _find_bars(path)
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"  # of frames and slices: the pixels do not depend on it
        rate = _header(path, container, stream).frames_per_second
        scaler = _Scaler(path, stream, bars)
        reading = _Reading(path, container, stream)
        first: float | None = None
        for number, frame in enumerate(reading.frames()):
            # A frame without a time stamp: as if the rate were constant.
            stamp = number / rate if frame.time is None else frame.time
            first = stamp if first is None else first
            time_s = max(0.0, stamp - first)
            if number >= _MAX_FRAMES or time_s > MAX_DURATION_S:
                raise _too_long(path, time_s)
            yield Frame(time_s, scaler.scale(frame))
        reading.check_complete()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video; what FFmpeg reports becomes one line."""
    try:
        import av
    except ImportError:
        raise missing_extra("videos: PyAV") from None
    # A file object, so that nothing to which the file refers is opened.
    with open_file(path) as file:
        try:
            container: InputContainer = av.open(
                file,
                "r",
                metadata_errors="replace",
                container_options={"format_whitelist": _FORMATS},
            )
        except (av.FFmpegError, ValueError) as error:
            size = os.fstat(file.fileno()).st_size
            raise DataError(
                f"{path}: got {size} bytes that are no complete video ({_reason(error)}); "
                f"{_EXCLUDE}"
            ) from None
        with container:
            yield container, _video_stream(path, container)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    """Return the first stream that is a video, not the cover of a music file."""
    from av.stream import Disposition

    covers = Disposition.attached_pic
    streams = [one for one in container.streams.video if not one.disposition & covers]
    if not streams:
        kinds = ", ".join(sorted({one.type for one in container.streams})) or "no stream"
        raise DataError(f"{path}: got {kinds}, want a video stream; {_EXCLUDE}")
    context = streams[0].codec_context
    if context is None:
        raise DataError(f"{path}: got a codec that FFmpeg cannot decode; convert it to H.264")
    _check_picture(path, context.height, context.width)
    return streams[0]


def _check_picture(path: Path, height: int, width: int) -> None:
    try:
        check_size(height, width)
    except BadImage as error:
        raise DataError(f"{path}: got {error}; scale the video down") from None


def _header(path: Path, container: InputContainer, stream: VideoStream) -> VideoHeader:
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    duration_s = max(0.0, (container.duration or 0) / 1_000_000)
    if duration_s > MAX_DURATION_S:
        raise _too_long(path, duration_s)
    return VideoHeader(duration_s, rate if 0 < rate <= 1000 else 25.0)


def _too_long(path: Path, duration_s: float) -> DataError:
    return DataError(
        f"{path}: got {duration_s / 3600:.1f} h of video, want at most {MAX_DURATION_S // 3600} h "
        f"and {_MAX_FRAMES:,} frames; cut it, or leave the movie out (data.exclude)"
    )


class _Reading:
    """Decoding of one video, with counts of what is missing."""

    def __init__(self, path: Path, container: InputContainer, stream: VideoStream) -> None:
        self._path, self._container, self._stream = path, container, stream
        self._packets = self._bad = self._frames = 0
        self._begin_s = (container.start_time or 0) / 1_000_000
        self._end_s = self._begin_s
        self._problem = ""

    def frames(self) -> Iterator[VideoFrame]:
        """Yield the decoded frames; damaged packets are counted."""
        import av

        try:
            # All streams: their last packet shows whether the file is complete.
            for packet in self._container.demux():
                self._note(packet)
                if packet.stream is self._stream:
                    yield from self._decode(packet)
        except av.FFmpegError as error:
            self._problem = f" ({_reason(error)})"

    def _decode(self, packet: Any) -> Iterator[VideoFrame]:
        import av

        try:
            for frame in packet.decode():
                self._frames += 1
                self._bad += frame.is_corrupt
                yield frame
        except av.FFmpegError as error:
            self._bad += 1
            self._problem = f" ({_reason(error)})"

    def _note(self, packet: Any) -> None:
        self._packets += packet.stream is self._stream and packet.size > 0
        if packet.pts is not None and packet.time_base:
            end = (packet.pts + (packet.duration or 0)) * packet.time_base
            self._end_s = max(self._end_s, float(end))

    def check_complete(self) -> None:
        """Raise ``DataError`` if the file is truncated, or more than a few packets are damaged."""
        want_s = (self._container.duration or 0) / 1_000_000
        got_s = self._end_s - self._begin_s
        n_stated = self._stream.frames  # 0 where the container does not state it
        if got_s < want_s - max(0.5, 0.05 * want_s) or self._packets < 0.95 * n_stated:
            raise DataError(
                f"{self._path}: got {self._packets} frames in {got_s:.1f} s, want the "
                f"{n_stated or 'frames'} in {want_s:.1f} s that its header states: truncated or "
                f"corrupt{self._problem}; {_EXCLUDE}"
            )
        if not self._frames or self._bad > max(1, _MAX_BAD_FRACTION * self._packets):
            raise DataError(
                f"{self._path}: got {self._frames} frames, {self._bad} of {self._packets} packets "
                f"cannot be decoded{self._problem}; {_EXCLUDE}"
            )


class _Scaler:
    """Crops, rotates and scales frames; the filters are built again if the format changes."""

    def __init__(self, path: Path, stream: VideoStream, bars: Bars) -> None:
        self._path, self._stream, self._bars = path, stream, bars
        self._size = stream.codec_context.height, stream.codec_context.width
        self._format: tuple[object, ...] = ()
        self._graph: Any = None

    def scale(self, frame: VideoFrame) -> VideoFrame:
        """Return the frame at a height of 240 pixels, in YUV."""
        layout = (frame.width, frame.height, frame.format.name, frame.rotation, _matrix(frame))
        if layout != self._format:
            _check_picture(self._path, frame.height, frame.width)
            self._graph, self._format = self._build(frame), layout
        self._graph.push(frame)
        scaled: VideoFrame = self._graph.pull()
        return scaled

    def _build(self, frame: VideoFrame) -> Any:
        from av.filter import Graph

        graph: Any = Graph()
        graph.threads = _THREADS
        nodes = [
            graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=self._stream.time_base,
            ),
            *(graph.add(name, arguments) for name, arguments in self._filters(frame)),
            graph.add("buffersink"),
        ]
        for before, after in itertools.pairwise(nodes):
            before.link_to(after)
        graph.configure()
        return graph

    def _filters(self, frame: VideoFrame) -> Iterator[tuple[str, str]]:
        """Yield names and arguments of FFmpeg's filters, in order."""
        # Bars were found in frames of the first size only.
        bars = self._bars if (frame.height, frame.width) == self._size else Bars()
        width, height = frame.width - 2 * bars.x, frame.height - 2 * bars.y
        turns = round(frame.rotation / 90) % 4
        matrix, is_rgb = _matrix(frame), frame.format.is_rgb
        if not is_rgb:
            yield "setparams", f"colorspace={matrix}:range={_range(frame)}"
        if bars != Bars():
            yield "crop", f"{width}:{height}:{bars.x}:{bars.y}"
        yield from _ROTATIONS[turns]
        scale = f"w={self._width(width, height, turns)}:h={HEIGHT}:flags={_FLAGS}:out_range=tv"
        scale += f":out_color_matrix={matrix}"
        yield (
            "scale",
            scale if is_rgb else f"{scale}:in_color_matrix={matrix}:in_range={_range(frame)}",
        )
        # Ten bits only where the curve needs them: they double the memory of a frame.
        yield "format", "yuv420p10le" if frame.color_trc in _CURVES else "yuv420p"
        yield "setparams", f"colorspace={matrix}:range=tv"

    def _width(self, width: int, height: int, turns: int) -> int:
        """Return the even width of the display aspect ratio at the height of a key frame."""
        aspect = Fraction(width, height) * (self._stream.sample_aspect_ratio or 1)
        aspect = 1 / aspect if turns % 2 else aspect
        if aspect > _MAX_ASPECT:
            raise DataError(
                f"{self._path}: got a picture {float(aspect):.0f} times as wide as high, want at "
                f"most {_MAX_ASPECT}; {_EXCLUDE}"
            )
        return max(2, 2 * round(aspect * HEIGHT / 2))


_ROTATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (("transpose", "cclock"),),
    (("hflip", ""), ("vflip", "")),
    (("transpose", "clock"),),
)
"""Filters that rotate counterclockwise by 0, 90, 180 and 270 degrees."""


def _matrix(frame: VideoFrame) -> str:
    # Where the file does not state it: as players do, by the height.
    return _MATRICES.get(frame.colorspace, "bt709" if frame.height >= 720 else "smpte170m")


def _range(frame: VideoFrame) -> str:
    return "pc" if frame.color_range == _FULL_RANGE or "yuvj" in frame.format.name else "tv"


def _find_bars(path: Path) -> Bars:
    """Return the bars that are black in all of some frames, spread over the video.

    Bars are symmetric; so a film that is dark at the top is not cropped at its top.
    """
    rows_H, columns_W = np.zeros(0), np.zeros(0)
    for grey_HW in _spread_frames(path):
        row_H, column_W = grey_HW.mean(axis=1), grey_HW.mean(axis=0)
        if len(rows_H) and (len(row_H), len(column_W)) != (len(rows_H), len(columns_W)):
            return Bars()
        rows_H = np.maximum(rows_H, row_H) if len(rows_H) else row_H
        columns_W = np.maximum(columns_W, column_W) if len(columns_W) else column_W
    return Bars(_bar(columns_W), _bar(rows_H))


def _bar(levels: npt.NDArray[np.float64]) -> int:
    """Return the width of the bars at both ends, an even number of pixels."""
    bright = np.flatnonzero(levels > _BLACK)
    if not len(bright):
        return 0
    narrower = min(int(bright[0]), len(levels) - 1 - int(bright[-1]))
    is_bar = _MIN_BAR * len(levels) <= narrower <= _MAX_BAR * len(levels)
    return narrower + narrower % 2 if is_bar else 0


def _spread_frames(path: Path) -> Iterator[Pixels]:
    """Yield the grey values, uint8 ``[H, W]``, of some frames, spread over the video."""
    with _opened(path) as (container, stream):
        import av

        duration_s = _header(path, container, stream).duration_s
        stream.thread_type = "SLICE"  # decoding by frames would need several packets per frame
        begin = container.start_time or 0
        last = None
        for probe in range(_PROBES):
            # What cannot be read is reported when the complete video is.
            with suppress(av.FFmpegError, StopIteration):
                container.seek(begin + int((probe + 0.5) / _PROBES * duration_s * 1_000_000))
                frame = next(container.decode(stream))
                _check_picture(path, frame.height, frame.width)
                if frame.pts != last:
                    yield _pixels(frame.reformat(format="gray", threads=_THREADS))
                last = frame.pts
