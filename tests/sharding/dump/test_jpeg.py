from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

from sharding.dump.jpeg import jpeg_defect
from tests.sharding.conftest import Run
from tests.sharding.films import jpeg


@pytest.mark.parametrize(
    ("data", "defective"),
    [
        (jpeg(1), False),
        (jpeg(1) + bytes(200), False),
        (b"", True),
        (b"\xff\xd8", True),
        (jpeg(1)[:-2], True),
        (jpeg(1) + bytes(5000), True),
    ],
)
def test_a_jpeg_has_a_start_and_an_end_marker(data: bytes, defective: bool) -> None:
    assert (jpeg_defect(memoryview(data)) is not None) == defective


def picture(**options: object) -> bytes:
    """Return a JPEG of noise, with a preview that ends like a JPEG."""
    pixels = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    preview, buffer = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels[:40, :40]).save(preview, "JPEG")
    exif = b"Exif\0\0" + preview.getvalue()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif, **options)
    return buffer.getvalue()


TRAILERS = {
    "zeros": bytes(4096),
    "camera": b"SEFH" + os.urandom(5000).replace(b"\xff", b""),
}


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}])
def test_bytes_after_the_end_of_a_jpeg_are_no_defect(
    options: dict[str, object], trailer: str
) -> None:
    data = picture(**options)
    assert jpeg_defect(memoryview(data + TRAILERS[trailer])) is None
    for size in range(2000, len(data) - 1, 777):
        cut = data[:size] + TRAILERS[trailer]
        assert jpeg_defect(memoryview(cut)) == "no JPEG end marker, cut"


@pytest.mark.slow
def test_decoding_rejects_images_with_valid_markers(run: Run) -> None:
    # The images of this dump have the markers of a JPEG, but random bytes between them.
    assert run("build")[0] == 0
    code, _, err = run("build", "sharding.image_check=decode")
    assert (code, "planned for sharding.image_check markers, got decode" in err) == (1, True)
    assert run("plan", "--replace", "sharding.image_check=decode")[0] == 0
    code, _, err = run("build", "--replace", "sharding.image_check=decode", "sharding.workers=2")
    assert code == 1
    line = err.splitlines()[-1]
    assert line.startswith("error: movie tt000000")
    assert "want at most 1.0% (sharding.max_bad_fraction)" in line
