from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from encoders import resize
from encoders.resize import (
    CompiledResizer,
    PillowResizer,
    Pixels,
    Resizer,
    Side,
    installed_library,
    load_resizer,
    order_of,
    rows_first,
)

SOURCE = Path(resize.__file__).with_name("resize.c")
FILTERS = {False: Image.Resampling.BICUBIC, True: Image.Resampling.BILINEAR}


def compiled(folder: Path, source: str) -> Path:
    """Compile C code as the installation does; the processor selects the vector instructions."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "resize.c").write_text(source)
    command = [compiler, "-O3", "-shared", "-fPIC", "resize.c", "-o", "resize.so"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "resize.so"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("library"), SOURCE.read_text())


@pytest.fixture(scope="module")
def plain_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code for processors without AVX2."""
    source = SOURCE.read_text().replace("EACH_PROCESSOR int", "int")
    return compiled(tmp_path_factory.mktemp("plain"), source)


def noise(width: int, height: int, *, black_and_white: bool = False) -> Pixels:
    image_HW3 = np.random.default_rng(width * 1000 + height).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    return (image_HW3 > 127).astype(np.uint8) * np.uint8(255) if black_and_white else image_HW3


def by_rows_then_columns(image_HW3: Pixels, rows: Side, columns: Side, *, bilinear: bool) -> Pixels:
    """Resize the complete image with Pillow, then crop."""
    image = Image.fromarray(image_HW3)
    image = image.resize((columns.resized, rows.length), FILTERS[bilinear])
    pixels_HW3 = np.asarray(image.resize((columns.resized, rows.resized), FILTERS[bilinear]))
    return pixels_HW3[
        rows.start : rows.start + rows.count, columns.start : columns.start + columns.count
    ]


def resized(
    resizer: Resizer, image_HW3: Pixels, rows: Side, columns: Side, *, bilinear: bool
) -> Pixels:
    out = np.zeros((rows.count, columns.count, 3), np.uint8)
    resizer.resize(image_HW3, rows, columns, out, bilinear=bilinear)
    return out


@st.composite
def sides(draw: st.DrawFn) -> Side:
    length = draw(st.integers(1, 12) | st.integers(1, 700))
    resized = draw(st.integers(1, 12) | st.integers(1, 300))
    start = draw(st.integers(0, resized - 1))
    return Side(length, resized, start, draw(st.integers(1, resized - start)))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(sides(), sides(), st.booleans(), st.booleans())
def test_any_size_crop_and_filter_gives_the_pixels_of_pillow(
    library: Path,
    plain_library: Path,
    rows: Side,
    columns: Side,
    bilinear: bool,
    black_and_white: bool,
) -> None:
    image_HW3 = noise(columns.length, rows.length, black_and_white=black_and_white)
    expected = by_rows_then_columns(image_HW3, rows, columns, bilinear=bilinear)
    for resizer in (CompiledResizer(library), CompiledResizer(plain_library), PillowResizer()):
        got = resized(resizer, image_HW3, rows, columns, bilinear=bilinear)
        assert np.array_equal(got, expected)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.integers(1, 120),
    st.integers(1, 120),
    st.booleans(),
)
def test_the_order_of_the_passes_is_that_of_pillow(
    width: int, height: int, new_width: int, new_height: int, bilinear: bool
) -> None:
    sizes = width, height, new_width, new_height
    rows_first(*sizes, bilinear=bilinear)  # the first image of a size is not tried
    if not rows_first(*sizes, bilinear=bilinear):
        return  # Pillow resizes in one call
    image = Image.fromarray(noise(width, height, black_and_white=True))
    by_rows = image.resize((new_width, height), FILTERS[bilinear])
    by_rows = by_rows.resize((new_width, new_height), FILTERS[bilinear])
    assert by_rows == image.resize((new_width, new_height), FILTERS[bilinear])


@pytest.mark.parametrize("size", [(426, 240), (576, 240), (320, 240), (1920, 800)])
def test_key_frames_are_resized_by_the_library(size: tuple[int, int]) -> None:
    width, height = size
    assert rows_first(width, height, 224 * width // height, 224, bilinear=False)
    rows_first(width, height, 384, 384, bilinear=False)
    assert rows_first(width, height, 384, 384, bilinear=False)  # squash, e.g. SigLIP


def test_a_size_is_tried_at_its_second_image_unless_it_is_large() -> None:
    order_of.cache_clear()
    small = [rows_first(427, 241, 384, 384, bilinear=False) for _ in range(3)]
    large = [rows_first(1920, 1081, 384, 384, bilinear=False) for _ in range(3)]
    assert (small, large) == ([False, True, True], [False, False, False])


def test_an_array_of_another_shape_type_or_layout_is_refused(library: Path) -> None:
    resizer, rows, columns = CompiledResizer(library), Side(8, 4, 0, 4), Side(8, 4, 0, 4)
    out, image = np.zeros((4, 4, 3), np.uint8), noise(8, 8)
    wrong_images: list[Any] = [image[:7], image[:, ::-1], image.astype(np.int64)]
    for wrong in wrong_images:
        with pytest.raises(ValueError, match=r"want contiguous uint8 \[8, 8, 3\]"):
            resizer.resize(wrong, rows, columns, out, bilinear=False)
    with pytest.raises(ValueError, match=r"want contiguous uint8 \[4, 4, 3\]"):
        resizer.resize(image, rows, columns, out[:, :3], bilinear=False)


def test_a_copy_of_the_code_without_a_library_uses_that_of_the_installation(tmp_path: Path) -> None:
    copy, installation = tmp_path / "code", tmp_path / "site-packages"
    for folder in (copy, installation):
        (folder / "encoders").mkdir(parents=True)
        (folder / "encoders/resize.py").touch()
    library = installation / "encoders/_resize.abi3.so"
    library.touch()
    assert installed_library([str(copy), str(installation)]) == library


def test_the_compiled_library_is_used(library: Path) -> None:
    assert isinstance(load_resizer(library), CompiledResizer)


def test_without_a_usable_library_pillow_resizes_and_one_line_gives_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, foreign = tmp_path / "other", tmp_path / "foreign.so"
    other.mkdir()
    foreign.write_bytes(b"for another machine")
    # Four bits less: every pixel near a half is rounded to another value.
    imprecise = SOURCE.read_text().replace("FRACTION_BITS 22", "FRACTION_BITS 21")
    reasons = {
        None: "resize.c was not compiled when this package was installed",
        tmp_path / "missing.so": f"cannot load {tmp_path}/missing.so",
        foreign: f"cannot load {foreign}",
        compiled(tmp_path, "int other(void) { return 0; }"): f"cannot load {tmp_path}/resize.so",
        compiled(other, imprecise): f"{other}/resize.so gives other pixels than Pillow",
    }
    for path, reason in reasons.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert isinstance(load_resizer(path), PillowResizer)
        (record,) = caplog.records
        assert record.getMessage().startswith(reason)
        assert "install a C compiler and reinstall movienet-stream" in record.getMessage()
