"""Decoding and preprocessing: from JPEG bytes to the uint8 pixels that an image tower expects.

``exact`` reproduces OpenCLIP's pixels bit for bit: simplejpeg decodes like Pillow, and Pillow
resizes a landscape image horizontally, then vertically, so it can be cropped between both passes.
``fast`` resizes in uint8 with torch and differs by at most 2/255. Files that simplejpeg refuses
for other reasons than damage are decoded by Pillow in both modes.
"""

# H, W = pixels, 3 = RGB

from __future__ import annotations

import io
import math
import struct
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate

from sharding.dump.jpeg import FORMATS, BadImage, check_size, decode_jpeg

Mode = Literal["fast", "exact"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

REACH = 2
"""Radius of the bicubic filter in pixels, at the coarser of the two scales."""

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
    """Decoder of one image at a time into a tower's pixels; thread-safe."""

    def __init__(self, preprocessing: Preprocessing, mode: Mode) -> None:
        self._want = preprocessing
        self._mode = mode
        bilinear = preprocessing.interpolation == "bilinear"
        # For an input that is not square, OpenCLIP ignores the configured interpolation and uses
        # bicubic.
        is_square = preprocessing.height == preprocessing.width
        if not is_square and preprocessing.resize_mode == "shortest":
            bilinear = False
        self._filter = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        self._torch_filter = "bilinear" if bilinear else "bicubic"

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
        target = self._geometry(array_HW3.shape[0], array_HW3.shape[1])
        needs_padding = target.height < self._want.height or target.width < self._want.width
        if self._mode == "fast" and not needs_padding:
            out_HW3[:] = self._by_torch(array_HW3, target)
        else:
            out_HW3[:] = self._by_two_passes(Image.fromarray(array_HW3), target)
        return True

    def _geometry(self, height: int, width: int) -> Geometry:
        target = geometry(height, width, self._want)
        # The resized long side of an image of one row would need gigabytes.
        check_size(target.height, target.width)
        return target

    def _by_torch(self, array_HW3: Pixels, target: Geometry) -> Pixels:
        """Resize in uint8 without computing the pixels right of and below the crop."""
        factor_y, bottom = _crop_source(
            array_HW3.shape[0], target.height, target.top + self._want.height
        )
        factor_x, right = _crop_source(
            array_HW3.shape[1], target.width, target.left + self._want.width
        )
        source_HW3 = np.ascontiguousarray(array_HW3[:bottom, :right])
        # A permuted view of [1, H, W, 3] is channels_last, for which torch has a fast kernel. A
        # view of [H, W, 3] with an axis added later is not, and takes twice as long.
        resized = interpolate(
            torch.from_numpy(source_HW3)[None].permute(0, 3, 1, 2),
            scale_factor=(factor_y, factor_x),
            recompute_scale_factor=False,
            mode=self._torch_filter,
            antialias=True,
        )
        rows = slice(target.top, target.top + self._want.height)
        columns = slice(target.left, target.left + self._want.width)
        pixels: Pixels = resized[0, :, rows, columns].permute(1, 2, 0).numpy()
        return pixels

    def _by_two_passes(self, image: Image.Image, target: Geometry) -> Pixels:
        """Resize an RGB image; crop the columns before the second pass."""
        if image.height > image.width or self._want.resize_mode != "shortest":
            # Pillow may resize portrait images vertically first; two calls would then round
            # differently.
            return self._finish(self._resize(image, target.width, target.height), target)
        image = self._resize(image, target.width, image.height)
        image = image.crop((target.left, 0, target.left + self._want.width, image.height))
        image = self._resize(image, image.width, target.height)
        return self._finish(image, Geometry(image.height, image.width, target.top, 0))

    def _by_pillow(self, data: bytes | memoryview) -> Pixels:
        """Resize in one call as OpenCLIP does: modes other than RGB round differently in two."""
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_size(image.height, image.width)
                target = self._geometry(image.height, image.width)
                return self._finish(self._resize(image, target.width, target.height), target)
        except UnidentifiedImageError:  # its message contains an address in memory
            raise BadImage("not a picture" if len(data) else "empty file") from None
        except PILLOW_ERRORS as error:
            raise BadImage(f"{type(error).__name__}: {error}") from None

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image.resize((width, height), self._filter)

    def _finish(self, image: Image.Image, target: Geometry) -> Pixels:
        """Crop, pad and convert to RGB, in OpenCLIP's order."""
        right = min(target.left + self._want.width, image.width)
        bottom = min(target.top + self._want.height, image.height)
        image = image.crop((target.left, target.top, right, bottom))
        x, y = self._want.width - image.width, self._want.height - image.height
        if x or y:
            edges = (x // 2, y // 2, (x + 1) // 2, (y + 1) // 2)
            fill = (self._want.fill_color,) * len(image.getbands())
            image = ImageOps.expand(image, edges, fill=fill)
        return np.asarray(image.convert("RGB"))


def _crop_source(length: int, resized: int, end: int) -> tuple[float, int]:
    """Return the resize factor, and how many source pixels determine the output before ``end``.

    Args:
        length: Length of one side of the source, in pixels.
        resized: Its length after resizing.
        end: End of the required output pixels.
    """
    scale = length / resized
    enough = math.ceil(end * scale + REACH * max(scale, 1.0)) + 1
    # Slightly more than the quotient: torch rounds the product down, which may lose a pixel.
    return resized / length * (1 + 1e-9), min(length, enough)
