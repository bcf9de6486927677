from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from slurm.probe import scratch_folder


def test_the_scratch_folder_is_that_of_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("demo", ["encoder.frame_storage=temporary"])
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    assert scratch_folder(config) == tmp_path
    configured = load_config("demo", ["encoder.scratch_dir=scratch"])
    assert scratch_folder(configured) == Path("scratch")
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert scratch_folder(config) == tmp_path / "temporary"
