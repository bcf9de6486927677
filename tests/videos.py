"""Small videos, written with PyAV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
FPS = 25


def scene(seed: int, height: int = 96, width: int = 160) -> Pixels:
    """Return a picture of coloured blocks, unlike that of any other seed."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(40, 256, (4, 4, 3), dtype=np.uint8)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return np.ascontiguousarray(blocks[rows][:, columns])


def scenes(*lengths: int, height: int = 96, width: int = 160) -> list[Pixels]:
    """Return the frames of scenes of these lengths in frames."""
    return [
        picture
        for seed, length in enumerate(lengths)
        for picture in [scene(seed, height, width)] * length
    ]


def write_video(
    path: Path,
    frames: Sequence[Pixels],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    stamps: Iterable[int] | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
    colour: tuple[int, int, int] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write frames (uint8 RGB) as a video of 25 frames per second; ``stamps`` in 1/25 s."""
    import av

    height, width = frames[0].shape[:2]
    with av.open(path, "w", options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=FPS)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, FPS)
        if codec == "libx265":
            stream.options = {"x265-params": "log-level=none"}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if colour is not None:
            stream.codec_context.colorspace, stream.codec_context.color_trc = colour[:2]
            stream.codec_context.color_primaries = colour[2]
        if rotation:
            stream.set_display_rotation(rotation)
        for stamp, pixels in zip(stamps or range(len(frames)), frames, strict=False):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    """Write a second of silence."""
    import av

    with av.open(path, "w") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        for number in range(43):
            frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            frame.sample_rate, frame.pts = 44100, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def pixels_of(jpeg: bytes) -> Pixels:
    """Decode a JPEG as uint8 ``[H, W, 3]``."""
    import simplejpeg

    pixels: Pixels = simplejpeg.decode_jpeg(jpeg)
    return pixels
