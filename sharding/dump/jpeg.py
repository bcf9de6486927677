"""Checks of an image: by its JPEG markers, or by decoding it. The encoders decode with it too.

No decoder of the product exceeds ``MAX_IMAGE_BYTES`` and ``MAX_PIXELS``, whatever a header states.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from configs.one_line import one_line

MAX_IMAGE_BYTES = 64 * 1024**2
"""Largest image that is read from a dump."""

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels, before and after resizing: Pillow's own limit."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
"""Formats that Pillow may try; none of them starts an external program."""

COLOURS = ("YCbCr", "RGB", "Gray")
"""JPEG colour spaces that simplejpeg converts to the same RGB as Pillow."""

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_TAIL_BYTES = 1024
_NEXT_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
"""A marker after compressed data, in which FF is followed by 00 or a restart marker."""

_PADDING = re.compile(r"([0-9]+) extraneous bytes before marker 0xd9")
_MAX_PADDING = 16
"""Some programs write a few bytes between the compressed data and the end marker."""


def jpeg_defect(jpeg: memoryview) -> str | None:
    """Return why bytes are not a complete JPEG, by its markers; None if they look like one."""
    if not len(jpeg):
        return "empty"
    if jpeg[:3] != _JPEG_START:
        return "no JPEG start marker"
    # The markers of a large trailer, e.g. of a camera or of padding, are followed from the start.
    if _JPEG_END in bytes(jpeg[-_TAIL_BYTES:]) or _has_end(jpeg):
        return None
    return "no JPEG end marker, cut"


def _has_end(jpeg: memoryview) -> bool:
    """Return whether an end marker follows the compressed data.

    An end marker before it is that of a preview, which a cut image may still contain.
    """
    at, in_scan = 2, False
    while (marker := _marker(jpeg, at, in_scan=in_scan)) is not None:
        at, kind = marker
        if kind == _JPEG_END[1]:
            return in_scan
        in_scan = in_scan or kind == _START_OF_SCAN
        at += int.from_bytes(jpeg[at : at + 2], "big")
    return False


def _marker(jpeg: memoryview, at: int, *, in_scan: bool) -> tuple[int, int] | None:
    """Return the first byte after the next marker, and its kind; None if there is none."""
    match = _NEXT_MARKER.search(jpeg, at) if in_scan else _NEXT_MARKER.match(jpeg, at)
    return (match.end(), match[1][0]) if match else None


class BadImage(Exception):  # noqa: N818  # a reason, never shown as an error
    """Image that no decoder can read. The message is the reason, the same on every machine."""


def check_size(height: int, width: int) -> None:
    """Raise ``BadImage`` for an image of more than ``MAX_PIXELS``, before memory is allocated."""
    if height * width > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, want at most {MAX_PIXELS:,}")


@contextmanager
def open_image(data: bytes | bytearray | memoryview) -> Iterator[Image.Image]:
    """Open an image of ``FORMATS`` with Pillow, whose errors pass unchanged.

    Raises:
        BadImage: it is larger than ``MAX_PIXELS``.
    """
    with warnings.catch_warnings():
        # Pillow only warns, and names no image. Other threads lose no other warning by this.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    with image:
        check_size(image.height, image.width)
        yield image


def decode_jpeg(data: bytes | memoryview) -> npt.NDArray[np.uint8] | None:
    """Return an image as uint8 ``[H, W, 3]``, RGB, as Pillow would decode it.

    Returns:
        None if only Pillow can decode it: other formats, colour spaces or harmless deviations.

    Raises:
        BadImage: it is cut or corrupt, and Pillow would fill the rest with grey; or too large.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_size(height, width)
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
    except (ValueError, RuntimeError) as error:
        if _is_damage(str(error)):
            raise BadImage(f"cut or corrupt: {error}") from None
        return None
    return pixels if space in COLOURS else None


def _is_damage(warning: str) -> bool:
    """Return whether a warning of libjpeg means that pixels are lost."""
    if match := _PADDING.search(warning):
        return int(match[1]) > _MAX_PADDING
    return warning.startswith(("Premature end", "Corrupt JPEG data"))


def undecodable(jpeg: memoryview) -> str | None:
    """Return why an image cannot be decoded completely; None if it can.

    simplejpeg is fast and strict. Pillow decodes some of the images that it refuses, e.g. CMYK or
    rare colour spaces. The encoders decode in the same way, so such images are valid.
    """
    try:
        return None if decode_jpeg(jpeg) is not None else _undecodable_by_pillow(jpeg)
    except BadImage as error:
        return f"not decodable: {error}"


def _undecodable_by_pillow(jpeg: memoryview) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(jpeg) as image:
                image.load()
    except Exception as error:  # noqa: BLE001  # corrupt images raise nearly any exception
        reason = one_line(str(error)) or type(error).__name__
        # Pillow's message contains the address of the buffer, which differs between runs.
        return "not decodable" if "BytesIO" in reason else f"not decodable: {reason}"
    return None
