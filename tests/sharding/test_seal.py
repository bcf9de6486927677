"""A frame set with too many bad images is not sealed."""

from __future__ import annotations

from pathlib import Path

from tests.sharding.conftest import Run
from tests.sharding.films import film, write_tar


def test_a_dump_with_too_many_bad_images_is_not_sealed(run: Run, tmp_path: Path) -> None:
    images = film("tt9", shots=4)
    images["shot_0001_img_1.jpg"] = b""
    write_tar(tmp_path / "dump", "tt9", images)
    code, _, err = run("build")
    assert code == 1
    assert "movie tt9: got 1 bad of 12 images, want at most 1.0%" in err.splitlines()[-1]
    assert run("build", "sharding.max_bad_fraction=0.1")[0] == 0
    code, _, err = run("seal", "sharding.max_bad_fraction=0.001")
    assert code == 1
    line = err.splitlines()[-1]
    assert "images in total, want at most 0.1% (sharding.max_bad_fraction)" in line
    assert "most in movie tt9 (1)" in line
