"""The guard judges the parser alone, and its memory limit fits any process."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.hostile.guard import SPARE_BYTES, limited_memory, no_side_effects


def test_a_write_of_the_parser_is_a_fault_and_one_of_another_thread_is_not(tmp_path: Path) -> None:
    other = threading.Thread(target=(tmp_path / "other").write_text, args=("x",))
    with no_side_effects():
        other.start()
        other.join()
    with pytest.raises(AssertionError, match="a parser must only read"), no_side_effects():
        (tmp_path / "own").write_text("x")


def test_the_memory_limit_is_above_what_the_process_has_mapped() -> None:
    with limited_memory():
        assert len(bytearray(SPARE_BYTES // 64)) == SPARE_BYTES // 64
        with pytest.raises(MemoryError):
            bytearray(2 * SPARE_BYTES)
