from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError, StateError
from eval.model import load_model, report_dir
from tests.eval.conftest import configuration

pytestmark = pytest.mark.slow


def test_a_report_is_in_the_run_or_next_to_the_file_that_it_is_about(
    trained: Path, exported: Path
) -> None:
    run = configuration(trained).run_dir
    assert report_dir(run, "val") == run / "report" / "val"
    assert report_dir(exported, "test") == trained / "mean-report" / "test"
    folder = run / "checkpoints" / "last"
    assert report_dir(folder, "val") == run / "checkpoints" / "last-report" / "val"


def test_a_path_that_is_no_model_is_one_line(trained: Path, tmp_path: Path) -> None:
    wanted = "want the folder of a run, one of its checkpoint folders, or a file written by"
    for path, got in ((tmp_path / "x", "which does not exist"), (tmp_path, "a folder without")):
        with pytest.raises(ConfigError, match=f"--model: got {path}, {got}.*; {wanted}"):
            load_model(path, "last")
    with pytest.raises(StateError, match=r"genres.json: corrupt .*; run `movienet-train export"):
        load_model(trained / "genres.json", "last")


def test_a_damaged_checkpoint_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(StateError, match=f"{tmp_path}: corrupt"):
        load_model(tmp_path, "last")
