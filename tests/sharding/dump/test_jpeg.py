from __future__ import annotations

import pytest

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
