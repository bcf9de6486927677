"""Films that are opened for a prediction."""

from __future__ import annotations

from pathlib import Path

from configs.load import load_config
from eval.films import open_film


def test_a_title_keeps_its_text_without_control_codes(tmp_path: Path) -> None:
    folder = tmp_path / "Am\u00e9lie\u00a0! می\u200cخواهم\x1b[2J"
    folder.mkdir()
    (folder / "0001.jpg").touch()
    with open_film(str(folder), load_config("demo")) as film:
        assert film.title == "Am\u00e9lie\u00a0! می\u200cخواهم\ufffd[2J"
