"""Whether an image decodes; the only place of this room that knows decoders."""

from __future__ import annotations

import io
import warnings

import simplejpeg
from PIL import Image


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
