"""Which files of a run `movienet-train sync` uploads. Contents are tested with wandb itself."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import HistoryRecord, HistoryStep, Record, RunExitRecord

from configs.runtime.wandb_files import (
    ended_twice,
    is_synced,
    last_run_id,
    mark_synced,
    next_step,
    offline_segments,
    segments_to_sync,
)


def attempts(run_dir: Path, *names: str) -> list[Path]:
    """Create the files of attempts."""
    segments = [run_dir / "wandb" / name / "run-ab12.wandb" for name in names]
    for segment in segments:
        segment.parent.mkdir(parents=True)
        segment.touch()
    return segments


@pytest.mark.parametrize("active", [True, False])
def test_of_online_attempts_only_an_ended_newest_one_may_have_lost_something(
    tmp_path: Path, active: bool
) -> None:
    _, offline, newest = attempts(
        tmp_path,
        "run-20260301_120000-ab12",
        "offline-run-20260301_130000-ab12",
        "run-20260301_140000-ab12",
    )
    expected = (offline,) if active else (offline, newest)
    assert segments_to_sync(tmp_path, active=active) == expected
    assert offline_segments(tmp_path) == (offline,)


def test_an_attempt_is_marked_like_wandb_does_and_keeps_its_id_if_two_began_in_one_second(
    tmp_path: Path,
) -> None:
    (segment,) = attempts(tmp_path, "run-20260301_120000-ab12-1")
    assert (is_synced(segment), last_run_id(tmp_path)) == (False, "ab12")
    mark_synced(segment)
    assert segment.with_name("run-ab12.wandb.synced").exists()
    assert is_synced(segment)


def test_without_files_nothing_shows_what_was_stored(tmp_path: Path) -> None:
    assert next_step(tmp_path) is None


def log_of(records: list[Record]) -> bytes:
    """Write records as wandb does: chunks with a header of 7 bytes in blocks of 32 KiB."""
    log = bytearray(b":W&B\0\0\0")
    for record in records:
        rest, first = record.SerializeToString(), True
        while rest or first:
            space = 32768 - len(log) % 32768
            if space < 7:
                log += bytes(space)
                continue
            chunk, rest = rest[: space - 7], rest[space - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            log += struct.pack("<IHB", 0, len(chunk), kind) + chunk
            first = False
    return bytes(log)


def step_of(number: int) -> Record:
    """A record of one step, padded to 100 kB: several blocks."""
    return Record(
        history=HistoryRecord(step=HistoryStep(num=number)), uuid="x" * 100_000 * (number % 2)
    )


@pytest.mark.parametrize("steps", [1, 2, 101])
def test_the_last_complete_step_is_found_at_the_end_of_small_large_and_torn_files(
    tmp_path: Path, steps: int
) -> None:
    (segment,) = attempts(tmp_path, "offline-run-20260301_120000-ab12")
    log = log_of([step_of(number) for number in range(1, steps + 1)])
    segment.write_bytes(log)
    assert next_step(tmp_path) == steps + 1
    segment.write_bytes(log[:-1])
    assert next_step(tmp_path) == (steps if steps > 1 else 0)


def test_a_service_that_was_ended_before_the_end_of_its_run_leaves_two_ends(tmp_path: Path) -> None:
    (segment,) = attempts(tmp_path, "run-20260301_120000-ab12")
    end = Record(exit=RunExitRecord(exit_code=0))
    for ends in (1, 2):
        segment.write_bytes(log_of([step_of(1), *[end] * ends]))
        assert ended_twice(segment) == (ends == 2)
