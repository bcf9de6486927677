from __future__ import annotations

import logging
import re
import sys
from io import StringIO

import pytest

from configs.runtime.logs import start_logging

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def lines(monkeypatch: pytest.MonkeyPatch, stream: StringIO, **options: bool) -> list[str]:
    """Log one record per level and return the written lines."""
    monkeypatch.setattr(sys, "stderr", stream)
    start_logging(**options)
    logger = logging.getLogger("training.loop")
    logger.debug("detail")
    logger.info("epoch %d", 3)
    logger.warning("no GPU")
    return stream.getvalue().splitlines()


def test_on_a_terminal_a_line_is_the_message_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, Terminal()) == ["epoch 3", "warning: no GPU"]


def test_in_a_file_a_line_begins_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    info, warning = lines(monkeypatch, StringIO())
    assert re.fullmatch(f"{TIME} epoch 3", info)
    assert re.fullmatch(f"{TIME} warning: no GPU", warning)


@pytest.mark.parametrize(("rank", "expected"), [("0", ["epoch 3", "warning: no GPU"]), ("3", [])])
def test_with_several_ranks_each_line_names_its_rank_and_only_rank_0_logs_progress(
    monkeypatch: pytest.MonkeyPatch, rank: str, expected: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", "0")
    written = lines(monkeypatch, Terminal())
    assert written == [f"[rank {rank}] {line}" for line in expected or ["warning: no GPU"]]
    in_file = lines(monkeypatch, StringIO())
    assert re.fullmatch(rf"{TIME} \[rank {rank}\] warning: no GPU", in_file[-1])


def test_a_rank_without_local_rank_is_named_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert lines(monkeypatch, Terminal()) == ["[rank 3] warning: no GPU"]
    monkeypatch.setenv("RANK", "three")
    assert lines(monkeypatch, Terminal()) == ["epoch 3", "warning: no GPU"]


def test_quiet_leaves_warnings_and_debug_adds_detail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, Terminal(), quiet=True) == ["warning: no GPU"]
    assert lines(monkeypatch, Terminal(), debug=True) == ["detail", "epoch 3", "warning: no GPU"]
