"""Decoding and preprocessing: from JPEG bytes to the uint8 pixels that an image tower expects.

The pixels are those of OpenCLIP's transform, bit for bit: simplejpeg decodes like Pillow, and
``resize.py`` resizes like Pillow, only the pixels of the crop. Files that simplejpeg refuses for
other reasons than damage are decoded by Pillow.
"""

# H, W = pixels, 3 = RGB

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from encoders.resize import Resizer, Side, installed_resizer, rows_first
from sharding.dump.jpeg import BadImage, check_size, decode_jpeg, open_image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    Image.DecompressionBombError,
)
"""Errors that Pillow's readers raise on corrupt files."""


@dataclass(frozen=True)
class Preprocessing:
    """Input format of a tower; the fields of OpenCLIP's ``PreprocessCfg``."""

    height: int
    """Input height in pixels."""

    width: int
    """Input width in pixels."""

    mean: tuple[float, float, float]
    """Subtracted from RGB values in 0 to 1."""

    std: tuple[float, float, float]
    """Divides the difference."""

    interpolation: str = "bicubic"
    """``bicubic`` or ``bilinear``."""

    resize_mode: str = "shortest"
    """``shortest`` edge then crop, ``longest`` edge then pad, or ``squash``."""

    fill_color: int = 0
    """Grey level of the padding, 0 to 255."""

    def as_dict(self) -> dict[str, object]:
        """Return plain values for a plan or manifest."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Geometry:
    """Size after resizing, and top left corner of the crop of the tower's input size, in pixels."""

    height: int
    width: int
    top: int
    left: int


def geometry(height: int, width: int, want: Preprocessing) -> Geometry:
    """Return the geometry that OpenCLIP's transform chooses for an image.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        want: Input format of the tower.

    Returns:
        With ``longest`` one side may be smaller than the input size; it is padded later.
    """
    if want.resize_mode == "squash":
        return Geometry(want.height, want.width, 0, 0)
    # int() and round() as in OpenCLIP: any other rounding shifts the crop by a pixel.
    if want.resize_mode == "shortest" and want.height == want.width:
        new = _shortest(height, width, want.height)
    else:
        pick = max if want.resize_mode == "longest" else min
        ratio = pick(height / want.height, width / want.width)
        # OpenCLIP fails on an image so thin that a side rounds to 0. It retains one pixel here.
        new = max(1, round(height / ratio)), max(1, round(width / ratio))
    top, left = (max(0, new[0] - want.height), max(0, new[1] - want.width))
    return Geometry(*new, round(top / 2.0), round(left / 2.0))


def _shortest(height: int, width: int, size: int) -> tuple[int, int]:
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


class Decoder:
    """Decoder of one image at a time into a tower's pixels; thread-safe.

    Args:
        preprocessing: Input format of the tower.
        resizer: Default: the compiled one, if it is installed.
    """

    def __init__(self, preprocessing: Preprocessing, resizer: Resizer | None = None) -> None:
        self._want = preprocessing
        self._resizer = resizer or installed_resizer()
        # For an input that is not square, OpenCLIP ignores the configured interpolation and uses
        # bicubic.
        is_square = preprocessing.height == preprocessing.width
        self._bilinear = preprocessing.interpolation == "bilinear" and (
            is_square or preprocessing.resize_mode != "shortest"
        )

    def decode(self, data: bytes | memoryview, out_HW3: Pixels) -> bool:
        """Write an image to ``out_HW3`` (uint8, RGB, the tower's height and width).

        Returns:
            False if simplejpeg cannot decode the file and Pillow decoded it.

        Raises:
            BadImage: Pillow cannot decode it either, or it is cut or too large; ``out_HW3`` is
                unchanged.
        """
        array_HW3 = decode_jpeg(data)
        if array_HW3 is None:
            out_HW3[:] = self._by_pillow(data)
            return False
        height, width, _ = array_HW3.shape
        target = self._geometry(height, width)
        needs_padding = target.height < self._want.height or target.width < self._want.width
        if needs_padding or not rows_first(
            width, height, target.width, target.height, bilinear=self._bilinear
        ):
            out_HW3[:] = self._resized(Image.fromarray(array_HW3), target)
            return True
        rows = Side(height, target.height, target.top, self._want.height)
        columns = Side(width, target.width, target.left, self._want.width)
        self._resizer.resize(array_HW3, rows, columns, out_HW3, bilinear=self._bilinear)
        return True

    def _geometry(self, height: int, width: int) -> Geometry:
        target = geometry(height, width, self._want)
        # The resized long side of an image of one row would need gigabytes.
        check_size(target.height, target.width)
        return target

    def _by_pillow(self, data: bytes | memoryview) -> Pixels:
        """Resize in one call as OpenCLIP does: modes other than RGB round differently in two."""
        try:
            with open_image(data) as image:
                target = self._geometry(image.height, image.width)
                return self._resized(image, target)
        except UnidentifiedImageError:  # its message contains an address in memory
            raise BadImage("not a picture" if len(data) else "empty file") from None
        except PILLOW_ERRORS as error:
            raise BadImage(f"{type(error).__name__}: {error}") from None

    def _resized(self, image: Image.Image, target: Geometry) -> Pixels:
        """Resize, crop, pad and convert to RGB, in OpenCLIP's order."""
        kind = Image.Resampling.BILINEAR if self._bilinear else Image.Resampling.BICUBIC
        image = image.resize((target.width, target.height), kind)
        right = min(target.left + self._want.width, image.width)
        bottom = min(target.top + self._want.height, image.height)
        image = image.crop((target.left, target.top, right, bottom))
        x, y = self._want.width - image.width, self._want.height - image.height
        if x or y:
            edges = (x // 2, y // 2, (x + 1) // 2, (y + 1) // 2)
            fill = (self._want.fill_color,) * len(image.getbands())
            image = ImageOps.expand(image, edges, fill=fill)
        return np.asarray(image.convert("RGB"))
