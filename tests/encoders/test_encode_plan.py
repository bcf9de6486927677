from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError, DataError
from encoders.encode_plan import EncodePlan, assigned_shards, resume
from tests.damage import damaged, reads_or_reports

PLAN = EncodePlan(
    encoder={"name": "tiny", "weights": "ab" * 32, "precision": "fp32"},
    dim=16,
    batch_size=32,
    threads=2,
    frames="cd" * 32,
    n_shards=3,
)

images = st.lists(st.integers(0, 1000), min_size=1, max_size=40)


def test_a_plan_survives_a_round_trip() -> None:
    assert EncodePlan.from_bytes(PLAN.to_bytes(), "here") == PLAN


def test_a_plan_has_these_bytes() -> None:
    assert PLAN.to_bytes() == (
        b'{"batch_size":32,"dim":16,"encoder":{"name":"tiny","precision":"fp32","weights":"'
        + b"ab" * 32
        + b'"},"format":1,"frames":"'
        + b"cd" * 32
        + b'","kind":"features","shards":3,"threads":2}\n'
    )


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"format":9,"kind":"features"}'])
def test_a_corrupt_plan_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="here"):
        EncodePlan.from_bytes(data, "here")


def resumed(new: EncodePlan, before: str | None, sealed: str | None = None) -> EncodePlan:
    return resume(PLAN, new, before=before, sealed=sealed, where="plan.json")


def test_a_different_plan_is_refused_in_one_line_that_lists_the_differences() -> None:
    other = replace(PLAN, encoder={**PLAN.encoder, "precision": "bf16"}, threads=4)
    with pytest.raises(ConfigError) as caught:
        resumed(other, None)
    text = str(caught.value)
    assert 'encoder.precision was "fp32", is "bf16"; threads was 2, is 4' in text
    assert "--replace" in text
    assert resumed(replace(PLAN), None) == PLAN


def test_a_set_of_an_older_version_with_fast_pixels_is_continued_under_its_record() -> None:
    exact, fast = (
        replace(PLAN, encoder={**PLAN.encoder, "preprocess": kind}) for kind in ("exact", "fast")
    )
    grown = replace(exact, frames="ef" * 32, n_shards=5)
    plan = resume(fast, grown, before=fast.frames, sealed=None, where="plan.json")
    assert plan == replace(grown, encoder=fast.encoder)
    assert plan.input_digest("ab") == fast.input_digest("ab")


def test_a_custom_set_of_an_older_version_is_continued_with_the_pretrained_it_records() -> None:
    old = replace(PLAN, encoder={**PLAN.encoder, "pretrained": "openai"})
    grown = replace(PLAN, frames="ef" * 32, n_shards=5)
    plan = resume(old, grown, before=old.frames, sealed=None, where="plan.json")
    assert plan == replace(grown, encoder=old.encoder)
    assert plan.input_digest("ab") == old.input_digest("ab")


def test_added_frames_make_an_extension_that_records_its_parent() -> None:
    grown = replace(PLAN, frames="ef" * 32, n_shards=5)
    assert resumed(grown, PLAN.frames, "aa" * 32) == replace(grown, parent="aa" * 32)
    assert resumed(grown, PLAN.frames) == grown, "never sealed"
    with pytest.raises(ConfigError, match=r"frames was .*; shards was 3, is 5"):
        resumed(grown, None)
    other = replace(grown, encoder={**PLAN.encoder, "precision": "bf16"})
    with pytest.raises(
        ConfigError, match=r'configuration: encoder\.precision was "fp32", is "bf16";'
    ):
        resumed(other, PLAN.frames, "aa" * 32)


def test_the_input_digest_depends_only_on_source_and_encoder() -> None:
    first = PLAN.input_digest("00")
    # Golden: with another digest, every existing set would have to be encoded again.
    assert first == "9bc9f8d1a0806a4ea6a573e572cb05a351ff27d92c3cd4a1e3726aff1d4ef8df"
    assert first == replace(PLAN, frames="ef" * 32, n_shards=9).input_digest("00")
    others = [
        PLAN.input_digest("01"),
        replace(PLAN, encoder={**PLAN.encoder, "weights": "ff"}).input_digest("00"),
        replace(PLAN, batch_size=33).input_digest("00"),
        replace(PLAN, threads=3).input_digest("00"),
    ]
    assert first not in others


@given(images, st.integers(1, 6), st.integers(1, 4))
def test_every_shard_is_assigned_to_exactly_one_rank_of_one_task(
    images: list[int], tasks: int, size: int
) -> None:
    assigned = [
        number
        for task in range(tasks)
        for rank in range(size)
        for number in assigned_shards(images, (task, tasks), rank, size)
    ]
    assert sorted(assigned) == list(range(len(images)))


@given(images, st.integers(1, 4), st.integers(1, 4))
def test_tasks_with_different_numbers_of_ranks_never_overlap(
    images: list[int], first: int, second: int
) -> None:
    def task(task: int, size: int) -> set[int]:
        return {n for rank in range(size) for n in assigned_shards(images, (task, 2), rank, size)}

    assert not task(0, first) & task(1, second)


def test_a_rank_starts_with_the_longest_shard() -> None:
    assert assigned_shards([3, 9, 5], (0, 1), 0, 1) == (1, 2, 0)


@given(st.data())
def test_a_damaged_plan_is_read_or_a_one_line_error(data: st.DataObject) -> None:
    corrupt = data.draw(damaged(PLAN.to_bytes()))
    assert reads_or_reports(lambda: EncodePlan.from_bytes(corrupt, "plan.json"))
