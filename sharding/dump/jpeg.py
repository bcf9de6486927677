"""Whether an image is a valid JPEG: by its markers, or by decoding it."""

from __future__ import annotations

import io
import warnings

import simplejpeg
from PIL import Image

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_TAIL_BYTES = 1024  # some writers leave a few bytes behind the end marker


def jpeg_defect(jpeg: memoryview) -> str | None:
    """Say why bytes are no whole JPEG; None if they look like one. Nothing is decoded."""
    if not len(jpeg):
        return "empty"
    if jpeg[:3] != _JPEG_START:
        return "no JPEG start marker"
    if _JPEG_END not in bytes(jpeg[-_TAIL_BYTES:]):
        return "no JPEG end marker, cut"
    return None


def undecodable(jpeg: memoryview) -> str | None:
    """Say why an image does not decode to the last pixel; None if it does.

    simplejpeg is fast and strict; what it refuses may still be an image to Pillow (CMYK, or an odd
    colour space), and then it is one to the encoders, which go the same way.
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
    except Exception as error:  # noqa: BLE001  # damaged images raise nearly anything
        why = " ".join(str(error).split()) or type(error).__name__
        # Pillow names the buffer, whose address is another one each time.
        return "not decodable" if "BytesIO" in why else f"not decodable: {why}"
    return None
