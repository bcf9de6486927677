"""Checks of an image: by its JPEG markers, or by decoding it."""

from __future__ import annotations

import io
import warnings

import simplejpeg
from PIL import Image

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_TAIL_BYTES = 1024  # some writers append a few bytes to the end marker


def jpeg_defect(jpeg: memoryview) -> str | None:
    """Return why bytes are not a complete JPEG, by its markers; None if they look like one."""
    if not len(jpeg):
        return "empty"
    if jpeg[:3] != _JPEG_START:
        return "no JPEG start marker"
    if _JPEG_END not in bytes(jpeg[-_TAIL_BYTES:]):
        return "no JPEG end marker, cut"
    return None


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
