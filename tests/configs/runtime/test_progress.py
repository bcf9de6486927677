from __future__ import annotations

import logging

import pytest

from configs.runtime.progress import progress


def test_away_from_a_terminal_the_last_line_stands_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("configs").propagate = True
    with caplog.at_level(logging.INFO), progress(3, label="encode", unit="images") as bar:
        bar.advance(2, loss=0.5)
        bar.advance(1, loss=0.25)
    assert "encode: 3/3 images" in caplog.text
    assert "loss 0.25" in caplog.text
