"""Which files of a run `movienet-train sync` uploads. Contents are tested with wandb itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.runtime.wandb_files import (
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
