"""The cursor: a position advances step by step, and is restored only with matching digests."""

from __future__ import annotations

from typing import Any

import pytest

from configs.errors import StateError
from training.stream.cursor import Digests, EpochCursor

DIGESTS = Digests(data="d" * 64, labels="l" * 64, plan="p" * 64)


def cursor_at(epoch: int, step: int) -> EpochCursor:
    cursor = EpochCursor(3, DIGESTS)
    cursor.load_state_dict({**cursor.state_dict(), "epoch": epoch, "step": step})
    return cursor


def test_the_state_has_six_fields_in_a_fixed_order() -> None:
    assert list(cursor_at(5, 2).state_dict().items()) == [
        ("version", 1),
        ("epoch", 5),
        ("step", 2),
        ("data", "d" * 64),
        ("labels", "l" * 64),
        ("plan", "p" * 64),
    ]


def test_the_last_step_of_an_epoch_is_followed_by_the_first_of_the_next() -> None:
    cursor = cursor_at(0, 0)
    positions = []
    for _ in range(4):
        cursor.advance(cursor.epoch, cursor.step)
        positions.append((cursor.epoch, cursor.step))
    assert positions == [(0, 1), (0, 2), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: got 2, want 1"),
        ({"data": "x" * 64}, "data digest: got xxxxxxxxxxxx, want dddddddddddd"),
        ({"labels": None}, "labels digest: got None"),
        ({"plan": "x" * 64}, "plan digest.*stream.seed"),
        ({"epoch": -1}, "got epoch -1"),
        ({"epoch": 2**64}, "got epoch 18446744073709551616"),
        ({"step": 3}, "step below 3"),
        ({"step": True}, "step True"),
    ],
)
def test_a_foreign_or_corrupt_state_is_refused_and_leaves_the_position_unchanged(
    change: dict[str, Any], message: str
) -> None:
    cursor = cursor_at(4, 1)
    with pytest.raises(StateError, match=message):
        cursor.load_state_dict({**cursor.state_dict(), **change})
    assert (cursor.epoch, cursor.step) == (4, 1)
