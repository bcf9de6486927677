"""Checks of an image: by its JPEG markers, or by decoding it."""

from __future__ import annotations

import io
import re
import warnings

import simplejpeg
from PIL import Image

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_TAIL_BYTES = 1024
_NEXT_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
"""A marker after compressed data, in which FF is followed by 00 or a restart marker."""


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


def undecodable(jpeg: memoryview) -> str | None:
    """Return why an image cannot be decoded completely; None if it can.

    simplejpeg is fast and strict. Pillow decodes some of the images that it refuses, e.g. CMYK or
    rare colour spaces. The encoders decode in the same way, so such images are valid.
    """
    try:
        simplejpeg.decode_jpeg(jpeg)
    except (ValueError, RuntimeError):
        return _undecodable_by_pillow(jpeg)
    return None


def _undecodable_by_pillow(jpeg: memoryview) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(jpeg)) as image:
                image.load()
    except Exception as error:  # noqa: BLE001  # corrupt images raise nearly any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        # Pillow's message contains the address of the buffer, which differs between runs.
        return "not decodable" if "BytesIO" in reason else f"not decodable: {reason}"
    return None
