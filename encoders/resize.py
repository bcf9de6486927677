"""Resize of a crop with the pixels of Pillow, bit for bit, in compiled code (``resize.c``).

The compiled library is an optional part of the installation. Without it Pillow resizes: the same
pixels, but decoding takes 2.5 times as long. The library is compared with Pillow when it is loaded,
so that neither another version of Pillow nor a wrong compilation can change pixels.
"""

# H, W = pixels, 3 = RGB, O = output pixels of one side, T = source pixels of an output (taps)

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
from PIL import Image

logger = logging.getLogger(__name__)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

FRACTION_BITS = 22
"""Bits after the point of a weight, as in Pillow."""

INSTALL = "install a C compiler and reinstall movienet-stream"


class _Axis(ctypes.Structure):
    """``struct axis`` of ``resize.c``."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("taps", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("start", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


@dataclass(frozen=True, eq=False)
class Axis:
    """Weights of one side of an image, for the library."""

    struct: _Axis
    arrays: tuple[np.ndarray[Any, np.dtype[np.int32]], ...]
    """The arrays that ``struct`` points to."""


@dataclass(frozen=True)
class Side:
    """Resize of one side of an image, and the outputs to compute, in pixels."""

    length: int
    resized: int
    start: int
    count: int


@lru_cache(maxsize=16)
def plan_axis(side: Side, *, bilinear: bool) -> Axis:
    """Return the weights of the outputs of a side, computed as by Pillow."""
    scale = side.length / side.resized
    coarse = max(scale, 1.0)
    support = coarse if bilinear else 2.0 * coarse
    centre_O = (side.start + np.arange(side.count) + 0.5) * scale
    low_O = np.maximum((centre_O - support + 0.5).astype(np.int64), 0)
    high_O = np.minimum((centre_O + support + 0.5).astype(np.int64), side.length)
    taps = int((high_O - low_O).max())
    # Every output has the same number of taps, those beyond its own have weight 0.
    first_O = np.minimum(low_O, side.length - taps)
    pixel_OT = first_O[:, None] + np.arange(taps)
    raw_OT = (_triangle if bilinear else _bicubic)(
        (pixel_OT - centre_O[:, None] + 0.5) * (1.0 / coarse)
    )
    raw_OT[(pixel_OT < low_O[:, None]) | (pixel_OT >= high_O[:, None])] = 0.0
    # Added one after another: numpy's sum() adds in another order, which affects the last bit.
    sum_O = np.add.accumulate(raw_OT, axis=1)[:, -1]
    weight_OT = raw_OT / np.where(sum_O == 0.0, 1.0, sum_O)[:, None] * (1 << FRACTION_BITS)
    weights = np.trunc(weight_OT + np.copysign(0.5, weight_OT)).astype(np.int32)
    first = first_O.astype(np.int32)
    start = int(first[0])
    length = int(first[-1]) + taps - start
    struct = _Axis(first.ctypes.data, weights.ctypes.data, taps, side.count, start, length)
    return Axis(struct, (first, weights))


def _triangle(x: Floats) -> Floats:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: Floats) -> Floats:
    x, a = np.abs(x), -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


class Resizer(Protocol):
    """Resize of RGB images whose rows Pillow resizes first (``rows_first``)."""

    def resize(
        self, image_HW3: Pixels, rows: Side, columns: Side, out_HW3: Pixels, *, bilinear: bool
    ) -> None:
        """Resize an image and write a crop of the result.

        Args:
            image_HW3: Image, contiguous.
            rows: Its height, the resized height, and the rows to compute.
            columns: The same for its width.
            out_HW3: Output ``[rows.count, columns.count, 3]``, contiguous.
            bilinear: Bilinear filter instead of bicubic.

        Raises:
            ValueError: the shape or layout of an array is wrong.
            MemoryError: the machine has not enough memory.
        """


class CompiledResizer:
    """The compiled library; its calls release the GIL.

    Args:
        path: ``resize.c`` as a shared library.

    Raises:
        OSError: the file is missing or not a library for this machine.
        AttributeError: it is another library.
    """

    def __init__(self, path: Path) -> None:
        # With other arguments it needs another name: an installation may have an older library.
        self._resize = ctypes.CDLL(str(path)).resize_rgb
        pointer = ctypes.c_void_p
        self._resize.argtypes = [pointer, ctypes.c_int64, pointer, pointer, pointer]

    def resize(
        self, image_HW3: Pixels, rows: Side, columns: Side, out_HW3: Pixels, *, bilinear: bool
    ) -> None:
        """Resize an image and write a crop of the result; see ``Resizer``."""
        _check(image_HW3, (rows.length, columns.length, 3))
        _check(out_HW3, (rows.count, columns.count, 3))
        y, x = plan_axis(rows, bilinear=bilinear), plan_axis(columns, bilinear=bilinear)
        if self._resize(
            image_HW3.ctypes.data,
            image_HW3.strides[0],
            ctypes.addressof(x.struct),
            ctypes.addressof(y.struct),
            out_HW3.ctypes.data,
        ):
            raise MemoryError(f"resize: no memory for {columns.length} x {rows.length} pixels")


def _check(pixels: Pixels, shape: tuple[int, int, int]) -> None:
    # The library would read or write outside of another array.
    if pixels.shape != shape or pixels.dtype != np.uint8 or not pixels.flags.c_contiguous:
        got = f"{pixels.dtype} {list(pixels.shape)}"
        raise ValueError(f"resize: got {got}, want contiguous uint8 {list(shape)}")


class PillowResizer:
    """Pillow in two calls, with the columns cropped in between."""

    def resize(
        self, image_HW3: Pixels, rows: Side, columns: Side, out_HW3: Pixels, *, bilinear: bool
    ) -> None:
        """Resize an image and write a crop of the result; see ``Resizer``."""
        kind = _filter(bilinear)
        image = Image.fromarray(image_HW3).resize((columns.resized, rows.length), kind)
        image = image.crop((columns.start, 0, columns.start + columns.count, rows.length))
        image = image.resize((columns.count, rows.resized), kind)
        out_HW3[:] = np.asarray(image)[rows.start : rows.start + rows.count]


LARGEST_TRIAL = 1920 * 1080
"""Pixels of the largest image whose size is tried: a trial of a larger one costs too much."""


def rows_first(width: int, height: int, new_width: int, new_height: int, *, bilinear: bool) -> bool:
    """Return whether Pillow certainly resizes the rows of an RGB image before its columns.

    It depends on the sizes, and affects the rounding. A size for which it is not certain is tried
    on noise, once, at the second image of that size.
    """
    if width == new_width or height == new_height:
        return True  # only one pass has any effect
    if width >= height and _keeps_proportions(width, height, new_width, new_height):
        return landscape_rows_first(bilinear=bilinear)
    if width * height > LARGEST_TRIAL:
        return False
    order = order_of((width, height, new_width, new_height), bilinear=bilinear)
    # Of concurrent threads one makes the trial. The others let Pillow resize meanwhile.
    if next(order.images) == 1:
        order.rows_first = _try(width, height, new_width, new_height, bilinear=bilinear)
    return order.rows_first


@dataclass
class Order:
    """What is known about the images of one size."""

    images: Iterator[int] = field(default_factory=count)
    """Counts them."""

    rows_first: bool = False
    """False until a trial."""


@lru_cache(maxsize=1024)
def order_of(sizes: tuple[int, int, int, int], *, bilinear: bool) -> Order:  # noqa: ARG001  # keys
    """Return the record of a size, the same object for each image."""
    return Order()


@cache
def landscape_rows_first(*, bilinear: bool) -> bool:
    """Return whether the installed Pillow resizes the rows of landscape images first."""
    sizes = ((426, 240, 397, 224), (120, 75, 144, 90))  # down and up
    return all(_try(*each, bilinear=bilinear) for each in sizes)


def _try(width: int, height: int, new_width: int, new_height: int, *, bilinear: bool) -> bool:
    """Return whether one call of Pillow gives the same pixels as rows first, on noise."""
    noise_HW3 = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, final, kind = Image.fromarray(noise_HW3), (new_width, new_height), _filter(bilinear)
    pixels = image.resize(final, kind).tobytes()
    by_rows = image.resize((new_width, height), kind).resize(final, kind).tobytes()
    by_columns = image.resize((width, new_height), kind).resize(final, kind).tobytes()
    return pixels == by_rows != by_columns


def _filter(bilinear: bool) -> Image.Resampling:  # noqa: FBT001  # private
    return Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC


def _keeps_proportions(width: int, height: int, new_width: int, new_height: int) -> bool:
    return abs(new_width - width * new_height / height) <= 1


@cache
def installed_resizer() -> Resizer:
    """Return the compiled library of this installation, or Pillow with one line in the log."""
    return load_resizer(installed_library(sys.path))


def installed_library(entries: Sequence[str]) -> Path | None:
    """Return the first compiled library; None if there is none.

    Args:
        entries: Folders that contain packages. The one of this module may have no library: jobs on
            a cluster run a copy of the code, and use the library of the installation.
    """
    folders = [str(Path(entry, "encoders")) for entry in entries]
    # The second one finds the library of an editable installation.
    spec = PathFinder.find_spec("encoders._resize", folders) or find_spec("encoders._resize")
    return Path(spec.origin) if spec and spec.origin else None


def load_resizer(path: Path | None) -> Resizer:
    """Return a compiled library, or Pillow with one line in the log if the library is unusable.

    Args:
        path: The library; None if it was not compiled.
    """
    if not all(landscape_rows_first(bilinear=bilinear) for bilinear in (False, True)):
        return _by_pillow(
            f"Pillow {PIL.__version__} resizes columns first", "install an older Pillow"
        )
    try:
        compiled = CompiledResizer(path) if path else None
    except (OSError, AttributeError) as error:
        return _by_pillow(f"cannot load {path} ({error})")
    if compiled is None:
        return _by_pillow("resize.c was not compiled when this package was installed")
    if not _equals_pillow(compiled):
        return _by_pillow(f"{path} gives other pixels than Pillow {PIL.__version__}")
    return compiled


def _by_pillow(reason: str, remedy: str = INSTALL) -> PillowResizer:
    logger.warning(
        "%s: images are resized by Pillow, with the same pixels, but decoding takes 2.5 times as "
        "long; %s",
        reason,
        remedy,
    )
    return PillowResizer()


def _equals_pillow(compiled: CompiledResizer) -> bool:
    """Return whether a library resizes noise as the installed Pillow does, down and up."""
    image_HW3 = np.random.default_rng(0).integers(0, 256, (75, 120, 3), dtype=np.uint8)
    for new_height, new_width in ((70, 112), (20, 32), (90, 144)):
        rows, columns = Side(75, new_height, 2, 16), Side(120, new_width, 9, 16)
        for bilinear in (False, True):
            outputs = np.empty((2, 16, 16, 3), np.uint8)
            compiled.resize(image_HW3, rows, columns, outputs[0], bilinear=bilinear)
            PillowResizer().resize(image_HW3, rows, columns, outputs[1], bilinear=bilinear)
            if not np.array_equal(outputs[0], outputs[1]):
                return False
    return True
