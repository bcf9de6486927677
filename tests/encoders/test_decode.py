from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFilter

from encoders.decode import Decoder, Pixels, Preprocessing
from encoders.resize import landscape_rows_first, load_resizer
from sharding.dump.jpeg import BadImage, undecodable

# OpenCLIP's, which takes seconds to import.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = Preprocessing(height=64, width=64, mean=MEAN, std=STD)
SIZES = [
    (426, 240),
    (240, 426),
    (576, 240),
    (64, 64),
    (65, 64),
    (50, 30),
    (3, 5),
    (1, 1),
    (449, 239),
]


def make_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    small = rng.integers(0, 255, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return image.filter(ImageFilter.GaussianBlur(0.7)).convert(mode)


def saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 90} if form == "JPEG" else {}), **options)
    return buffer.getvalue()


def by_open_clip(data: bytes, want: Preprocessing) -> Pixels:
    """Pixels of OpenCLIP's transform before the conversion to float."""
    import open_clip  # only in tests that are marked slow

    transform = open_clip.image_transform(
        (want.height, want.width),
        is_train=False,
        mean=want.mean,
        std=want.std,
        interpolation=want.interpolation,
        resize_mode=want.resize_mode,
        fill_color=want.fill_color,
    )
    image: Any = Image.open(io.BytesIO(data))
    for step in transform.transforms[:-2]:
        image = step(image)
    return np.asarray(image)


def decoded(data: bytes, want: Preprocessing) -> tuple[Pixels, bool]:
    out = np.zeros((want.height, want.width, 3), np.uint8)
    quick = Decoder(want).decode(data, out)
    return out, quick


def max_difference(a: Pixels, b: Pixels) -> int:
    return int(np.abs(a.astype(np.int16) - b).max())


UNUSUAL: dict[str, Callable[[], bytes]] = {
    "4:4:4": lambda: saved(make_image(426, 240), subsampling=0),
    "4:2:2": lambda: saved(make_image(426, 240), subsampling=1),
    "grey": lambda: saved(make_image(426, 240, "L")),
    "CMYK": lambda: saved(make_image(426, 240, "CMYK")),
    "progressive": lambda: saved(make_image(426, 240), progressive=True),
    "turned by EXIF": lambda: saved(make_image(426, 240), exif=turned()),
    "restart markers": lambda: saved(make_image(426, 240), restart_marker_blocks=4),
    "trailing garbage": lambda: saved(make_image(426, 240)) + bytes(1000),
    "a PNG": lambda: saved(make_image(426, 240), "PNG"),
    "a transparent PNG": lambda: saved(make_image(426, 240, "RGBA"), "PNG"),
    "a palette PNG": lambda: saved(make_image(426, 240).quantize(32), "PNG"),
    "padding before the end": lambda: saved(make_image(426, 240))[:-2] + bytes(12) + b"\xff\xd9",
}

DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "cut, with an end marker": lambda data: data[: len(data) // 2] + b"\xff\xd9",
    "half of it zeros": lambda data: data[: len(data) // 2] + bytes(len(data) // 2) + b"\xff\xd9",
}


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


def overwritten(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + np.random.default_rng(0).bytes(40) + data[middle + 40 :]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_those_of_open_clip_bit_for_bit(size: tuple[int, int]) -> None:
    data = saved(make_image(*size))
    pixels, quick = decoded(data, CLIP)
    assert quick
    assert max_difference(pixels, by_open_clip(data, CLIP)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_another_pillow_that_resizes_columns_first_gives_its_pixels_and_one_line(
    interpolation: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    want, data = Preprocessing(64, 64, MEAN, STD, interpolation), saved(make_image(426, 240))
    resize = Image.Image.resize

    def columns_first(image: Image.Image, size: tuple[int, int], *kind: Any) -> Image.Image:
        return resize(resize(image, (image.width, size[1]), *kind), size, *kind)

    landscape_rows_first.cache_clear()
    try:
        monkeypatch.setattr(Image.Image, "resize", columns_first)
        resizer, pixels = load_resizer(None), np.zeros((64, 64, 3), np.uint8)
        Decoder(want, resizer).decode(data, pixels)
        assert max_difference(pixels, by_open_clip(data, want)) == 0
    finally:
        landscape_rows_first.cache_clear()
    (record,) = caplog.records
    assert "resizes columns first: images are resized by Pillow" in record.getMessage()
    assert record.getMessage().endswith("; install an older Pillow")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(UNUSUAL))
def test_unusual_files_give_the_pixels_of_open_clip(name: str) -> None:
    data = UNUSUAL[name]()
    assert max_difference(decoded(data, CLIP)[0], by_open_clip(data, CLIP)) == 0


@pytest.mark.parametrize("name", ["CMYK", "a PNG", "padding before the end"])
def test_files_that_simplejpeg_refuses_count_as_read_by_pillow(name: str) -> None:
    assert not decoded(UNUSUAL[name](), CLIP)[1]


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("window", [(64, 64), (48, 80)])
@pytest.mark.parametrize("size", [(426, 240), (240, 426), (65, 66), (64, 64)])
def test_every_preprocessing_mode_gives_the_pixels_of_open_clip(
    interpolation: str, resize_mode: str, window: tuple[int, int], size: tuple[int, int]
) -> None:
    want = Preprocessing(*window, MEAN, STD, interpolation, resize_mode, fill_color=9)
    data = saved(make_image(*size))
    assert max_difference(decoded(data, want)[0], by_open_clip(data, want)) == 0


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from(["shortest", "longest", "squash"]))
def test_any_size_gives_the_pixels_of_open_clip(width: int, height: int, resize_mode: str) -> None:
    if resize_mode == "longest" and max(width, height) >= 64 * min(width, height):
        return  # OpenCLIP resizes such an image to 0 pixels and fails
    want = Preprocessing(32, 32, MEAN, STD, resize_mode=resize_mode)
    data = saved(make_image(width, height))
    assert max_difference(decoded(data, want)[0], by_open_clip(data, want)) == 0


@pytest.mark.parametrize(("width", "height"), [(1, 64), (64, 1), (2, 400)])
def test_an_image_too_thin_for_open_clip_retains_one_pixel_of_its_short_side(
    width: int, height: int
) -> None:
    want = Preprocessing(32, 32, MEAN, STD, resize_mode="longest", fill_color=9)
    pixels, _ = decoded(saved(make_image(width, height)), want)
    is_padding = (pixels == 9).all(axis=-1)
    along, across = (1, 0) if width < height else (0, 1)
    assert (~is_padding).any(axis=along).sum() == 32
    assert (~is_padding).any(axis=across).sum() == 1


@pytest.mark.parametrize("damage", sorted(DAMAGED))
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("CMYK", {}),
        ("L", {"restart_marker_blocks": 4}),
    ],
)
def test_a_damaged_file_is_bad_for_the_encoder_and_for_a_check(
    damage: str, mode: str, options: dict[str, Any]
) -> None:
    data = DAMAGED[damage](saved(make_image(426, 240, mode), **options))
    with pytest.raises(
        BadImage, match=r"^cut or corrupt: (Premature end|Corrupt JPEG data)"
    ) as bad:
        decoded(data, CLIP)
    assert undecodable(memoryview(data)) == f"not decodable: {bad.value}"


def test_a_file_with_overwritten_bytes_is_bad() -> None:
    with pytest.raises(BadImage, match=r"^cut or corrupt: Corrupt JPEG data: "):
        decoded(overwritten(saved(make_image(426, 240))), CLIP)


@pytest.mark.parametrize("name", sorted(UNUSUAL))
def test_a_check_accepts_what_the_encoder_decodes(name: str) -> None:
    assert undecodable(memoryview(UNUSUAL[name]())) is None


def test_garbage_and_an_empty_file_are_bad_for_a_deterministic_reason() -> None:
    with pytest.raises(BadImage, match=r"^not a picture$"):
        decoded(b"no picture at all", CLIP)
    with pytest.raises(BadImage, match=r"^empty file$"):
        decoded(b"", CLIP)


def test_a_bad_image_leaves_the_output_unchanged() -> None:
    out = np.full((64, 64, 3), 7, np.uint8)
    with pytest.raises(BadImage):
        Decoder(CLIP).decode(b"no picture", out)
    assert (out == 7).all()


def png_of_size(side: int) -> bytes:
    """Return the start of a PNG; its pixels are missing."""
    header = struct.pack(">4s2L5B", b"IHDR", side, side, 8, 2, 0, 0, 0)
    end = struct.pack(">L", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">L", 13) + header + end + b"\0\0\0\0IDAT"


def jpeg_of_size(side: int) -> bytes:
    data = bytearray(saved(make_image(64, 64)))
    start = data.index(b"\xff\xc0")  # the frame header: height and width follow
    data[start + 5 : start + 9] = struct.pack(">2H", side, side)
    return bytes(data)


@pytest.mark.parametrize("make", [jpeg_of_size, png_of_size])
def test_an_image_of_absurd_size_is_refused_before_memory_is_allocated(
    make: Callable[[int], bytes],
) -> None:
    data = make(65_500 if make is jpeg_of_size else 9_460)  # Pillow only warns of the latter
    tracemalloc.start()
    try:
        with pytest.raises(BadImage, match=r"pixels, want at most 89,478,485"):
            decoded(data, CLIP)  # and no warning, which would name no image
        assert "pixels, want at most 89,478,485" in str(undecodable(memoryview(data)))
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_an_image_that_would_be_resized_to_an_absurd_size_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(BadImage, match=r"pixels, want at most 89,478,485"):
        decoded(saved(make_image(*size)), CLIP)
