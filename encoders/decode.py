"""JPEG bytes become the uint8 pixels that an image tower expects.

``exact`` gives OpenCLIP's own pixels bit for bit: simplejpeg decodes as Pillow does, and Pillow
resizes the rows of a wide picture, then its columns, so the crop fits between the two passes.
``fast`` lets torch resize in uint8 and stays within 2/255 of them. What simplejpeg refuses goes
through Pillow in both.
"""

# H, W = pixels, 3 = RGB

from __future__ import annotations

import io
import math
import struct
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate

Mode = Literal["fast", "exact"]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
"""What Pillow may try: pictures only, never a format that starts a program."""

COLOURS = ("YCbCr", "RGB", "Gray")
"""JPEG colour spaces that simplejpeg turns into the same RGB as Pillow."""

REACH = 2
"""Pixels to each side that a bicubic weight reaches, at the coarser of the two scales."""

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
"""What Pillow's readers raise on damaged files."""


class BadImage(Exception):  # noqa: N818  # it names the thing, and never reaches a user
    """Nobody can read this picture; the message says why, the same on every machine."""


@dataclass(frozen=True)
class Preprocessing:
    """How a tower wants its pictures; the fields of OpenCLIP's own ``PreprocessCfg``."""

    height: int
    """Pixels."""

    width: int
    """Pixels."""

    mean: tuple[float, float, float]
    """Subtracted from RGB in 0 to 1."""

    std: tuple[float, float, float]
    """Divides what is left."""

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
    """Resize to ``height`` × ``width``, then cut the tower's window at ``top``, ``left``."""

    height: int
    width: int
    top: int
    left: int


def geometry(height: int, width: int, want: Preprocessing) -> Geometry:
    """Return the sizes that OpenCLIP's transform chooses for a picture.

    With ``longest`` one side may come out smaller than the tower's; it is then padded.
    """
    if want.resize_mode == "squash":
        return Geometry(want.height, want.width, 0, 0)
    if want.resize_mode == "shortest" and want.height == want.width:
        new = _shortest(height, width, want.height)
    else:
        pick = max if want.resize_mode == "longest" else min
        ratio = pick(height / want.height, width / want.width)
        new = round(height / ratio), round(width / ratio)
    top, left = (max(0, new[0] - want.height), max(0, new[1] - want.width))
    return Geometry(*new, round(top / 2.0), round(left / 2.0))


def _shortest(height: int, width: int, size: int) -> tuple[int, int]:
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


class Decoder:
    """Turns the bytes of one picture into a tower's pixels; safe to share between threads."""

    def __init__(self, preprocessing: Preprocessing, mode: Mode) -> None:
        self._want = preprocessing
        self._mode = mode
        bilinear = preprocessing.interpolation == "bilinear"
        # OpenCLIP resizes bicubically for a window that is not square, whatever is configured.
        odd = preprocessing.height != preprocessing.width
        if odd and preprocessing.resize_mode == "shortest":
            bilinear = False
        self._filter = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        self._torch_filter = "bilinear" if bilinear else "bicubic"

    def decode(self, data: bytes | memoryview, out_HW3: Pixels) -> bool:
        """Write the picture into ``out_HW3`` (uint8, RGB, the tower's height and width).

        Returns:
            False if simplejpeg refused the file and Pillow had to read it.

        Raises:
            BadImage: Pillow cannot read it either; ``out_HW3`` is untouched.
        """
        array_HW3 = _decode_jpeg(data)
        if array_HW3 is None:
            out_HW3[:] = self._by_pillow(data)
            return False
        place = geometry(array_HW3.shape[0], array_HW3.shape[1], self._want)
        whole = place.height >= self._want.height and place.width >= self._want.width
        if self._mode == "fast" and whole:
            out_HW3[:] = self._by_torch(array_HW3, place)
        else:
            out_HW3[:] = self._by_two_passes(Image.fromarray(array_HW3), place)
        return True

    def _by_torch(self, array_HW3: Pixels, place: Geometry) -> Pixels:
        """Resize in uint8; what lies right of and below the window is never made."""
        factor_y, bottom = _cut(array_HW3.shape[0], place.height, place.top + self._want.height)
        factor_x, right = _cut(array_HW3.shape[1], place.width, place.left + self._want.width)
        part_HW3 = np.ascontiguousarray(array_HW3[:bottom, :right])
        # A permuted view of [1, H, W, 3] is channels_last, for which torch has a quick kernel; one
        # of [H, W, 3] with an axis added later is not, and takes twice as long.
        resized = interpolate(
            torch.from_numpy(part_HW3)[None].permute(0, 3, 1, 2),
            scale_factor=(factor_y, factor_x),
            recompute_scale_factor=False,
            mode=self._torch_filter,
            antialias=True,
        )
        rows = slice(place.top, place.top + self._want.height)
        columns = slice(place.left, place.left + self._want.width)
        pixels: Pixels = resized[0, :, rows, columns].permute(1, 2, 0).numpy()
        return pixels

    def _by_two_passes(self, image: Image.Image, place: Geometry) -> Pixels:
        """Resize an RGB image; drop what the crop drops before the second pass."""
        if image.height > image.width or self._want.resize_mode != "shortest":
            # Pillow may take the columns of tall pictures first: then two calls round otherwise.
            return self._finish(self._resize(image, place.width, place.height), place)
        image = self._resize(image, place.width, image.height)
        image = image.crop((place.left, 0, place.left + self._want.width, image.height))
        image = self._resize(image, image.width, place.height)
        return self._finish(image, Geometry(image.height, image.width, place.top, 0))

    def _by_pillow(self, data: bytes | memoryview) -> Pixels:
        """Do what OpenCLIP does: other modes than RGB are rounded differently in two passes."""
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                place = geometry(image.height, image.width, self._want)
                return self._finish(self._resize(image, place.width, place.height), place)
        except UnidentifiedImageError:  # its own message holds an address in memory
            raise BadImage("not a picture" if len(data) else "empty file") from None
        except PILLOW_ERRORS as error:
            raise BadImage(f"{type(error).__name__}: {error}") from None

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        return image.resize((width, height), self._filter)

    def _finish(self, image: Image.Image, place: Geometry) -> Pixels:
        """Crop, pad and convert to RGB, in OpenCLIP's order."""
        right = min(place.left + self._want.width, image.width)
        bottom = min(place.top + self._want.height, image.height)
        image = image.crop((place.left, place.top, right, bottom))
        x, y = self._want.width - image.width, self._want.height - image.height
        if x or y:
            edges = (x // 2, y // 2, (x + 1) // 2, (y + 1) // 2)
            fill = (self._want.fill_color,) * len(image.getbands())
            image = ImageOps.expand(image, edges, fill=fill)
        return np.asarray(image.convert("RGB"))


def _cut(length: int, resized: int, end: int) -> tuple[float, int]:
    """Return by how much to resize, and how many pixels of the source give all before ``end``.

    Args:
        length: Of the source, along one side.
        resized: Length after the resize.
        end: First output pixel that nobody needs.
    """
    scale = length / resized
    enough = math.ceil(end * scale + REACH * max(scale, 1.0)) + 1
    # A hair more than the quotient: torch rounds the product down, which may cost a pixel.
    return resized / length * (1 + 1e-9), min(length, enough)


def _decode_jpeg(data: bytes | memoryview) -> Pixels | None:
    """Return [H, W, 3] RGB as Pillow would decode it; None if simplejpeg is not to be trusted."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        # Too large for Pillow's taste: let Pillow say so, before the memory is asked for.
        if space not in COLOURS or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            return None
        pixels: Pixels = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return pixels
