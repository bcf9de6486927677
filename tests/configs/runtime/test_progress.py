from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.runtime.progress import COLUMNS, Progress, progress

CHECKOUT = Path(__file__).parents[3]


class Clock:
    """Seconds that pass only when a test advances them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr("configs.runtime.progress.time.monotonic", lambda: self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="configs")
    return caplog


def test_without_a_terminal_the_final_state_is_logged(
    clock: Clock, log: pytest.LogCaptureFixture
) -> None:
    with progress(3, label="encode", unit="images") as bar:
        clock.seconds = 2
        bar.advance(2, loss=0.5)
        bar.advance(1, loss=0.25)
    assert log.messages == ["encode: 3/3 images  1.5/s  in 2.0 s  loss 0.25"]


def test_a_log_file_gets_one_line_per_minute_with_the_time_left(
    clock: Clock, log: pytest.LogCaptureFixture
) -> None:
    with progress(600, label="train", unit="steps") as bar:
        for second in range(1, 151):
            clock.seconds = float(second)
            bar.advance(2)
        assert log.messages == [
            "train: 120/600 steps  2/s  4 min 00 s left",
            "train: 240/600 steps  2/s  3 min 00 s left",
        ]


def test_without_a_total_the_elapsed_time_is_shown(clock: Clock) -> None:
    state = Progress(None, "scan", "movies")
    clock.seconds = 4
    state.advance(1000)
    assert state.line() == "scan: 1,000 movies  250/s  in 4.0 s"


def test_a_block_that_ends_early_logs_the_time_taken(
    clock: Clock, log: pytest.LogCaptureFixture
) -> None:
    with progress(600, label="train", unit="steps") as bar:
        clock.seconds = 30
        bar.advance(300)
    assert log.messages == ["train: 300/600 steps  10/s  in 30 s"]


def test_skipped_items_fill_the_counter_and_do_not_distort_the_time_left(clock: Clock) -> None:
    state = Progress(1000, "train", "steps")
    state.skip(800)
    clock.seconds = 10
    state.advance(100)
    assert state.line() == "train: 900/1,000 steps  10/s  10 s left"
    state.advance(98)
    state.skip(2)
    assert state.line().startswith("train: 1,000/1,000 steps")


@pytest.mark.parametrize("size", ["1", "64"])
def test_a_line_never_exceeds_80_columns_and_drops_the_last_figures_first(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    state = Progress(4_800_000, "encode", "images")
    clock.seconds = 3600
    figures = {"waiting": "3 %", "tower": "95 %", "all ranks": "6,400/s", "set": "12 min left"}
    state.advance(1_234_567, **figures)
    prefix = "" if size == "1" else "[rank 0] "
    line = prefix + state.line()
    assert len(line) <= COLUMNS
    assert "1,234,567/4,800,000 images  343/s  2 h 53 min left  waiting 3 %" in line
    assert "set 12 min left" not in line


def test_a_failed_block_logs_no_final_state(log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError), progress(3, label="encode", unit="images"):
        raise ZeroDivisionError
    assert log.messages == []


ON_A_TERMINAL = """
import logging, time
from configs.runtime.logs import start_logging
from configs.runtime.progress import progress
start_logging()
with progress(5978, label="encode", unit="images") as bar:
    for _ in range(7):
        bar.advance(854, waiting="3 %", tower="95 %", **{"all ranks": "6,400/s"})
        time.sleep(0.2)
    logging.getLogger("configs").warning("frames-00003.tar: unreadable")
    time.sleep(0.2)
"""


def test_on_an_80_column_terminal_no_row_is_longer_and_warnings_appear_above_the_bar() -> None:
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL], stderr=follower, env=environment
    ) as process:
        os.close(follower)
        written = b""
        while chunk := _read(leader):
            written += chunk
        os.close(leader)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    rows = [row.rstrip() for row in re.split(r"[\r\n]+", text) if row.strip()]
    assert max(len(row) for row in rows) <= COLUMNS
    assert "warning: frames-00003.tar: unreadable" in rows
    drawn = [row for row in rows if row.startswith("encode ") and "5,978/5,978 images" in row]
    assert drawn, rows
    assert re.fullmatch(
        r"encode: 5,978/5,978 images  \S+/s  in \S+ s  waiting 3 %  tower 95 %", rows[-1]
    )


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 65536)
    except OSError:  # Linux reports EIO when the last writer has closed the terminal
        return b""
