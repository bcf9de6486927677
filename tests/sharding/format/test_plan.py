from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from sharding.format.plan import Plan, PlannedMovie
from tests.sharding.format.values import counts, ids, texts


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = sorted(draw(st.sets(ids, max_size=8)))
    shard, movies = 0, []
    for k, name in enumerate(names):
        shard += draw(st.booleans()) if k else 0
        rest = draw(st.tuples(texts, texts, texts, st.none() | counts, counts))
        movies.append(PlannedMovie(name, *rest, shard=shard))
    return Plan(draw(st.integers(1, 2**40)), tuple(movies))


@pytest.mark.slow
@given(plans())
def test_a_plan_is_restored_from_its_bytes(plan: Plan) -> None:
    assert Plan.from_bytes(plan.to_bytes(), "plan") == plan


@pytest.mark.slow
@given(plans(), st.data())
def test_a_truncated_plan_is_a_one_line_error_with_its_path(
    plan: Plan, data: st.DataObject
) -> None:
    valid = plan.to_bytes()
    truncated = valid[: data.draw(st.integers(0, len(valid) - 2))]
    with pytest.raises(DataError, match=r"^here/plan\.json: ") as error:
        Plan.from_bytes(truncated, "here/plan.json")
    assert "\n" not in str(error.value)


def test_a_plan_of_another_format_version_is_refused() -> None:
    data = Plan(1, ()).to_bytes().replace(b'"format":1', b'"format":2')
    with pytest.raises(DataError, match="format: got 2, want 1"):
        Plan.from_bytes(data, "plan")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("b", 0), ("a", 0)], "order of id"),
        ([("a", 0), ("a", 0)], "order of id"),
        ([("a", 1)], "shard numbers"),
        ([("a", 0), ("b", 2)], "shard numbers"),
        ([("a.b", 0)], "movie id"),
    ],
)
def test_a_plan_in_the_wrong_order_is_refused(rows: list[tuple[str, int]], message: str) -> None:
    movies = tuple(PlannedMovie(movie, movie, movie, "", 1, 1, shard) for movie, shard in rows)
    with pytest.raises(DataError, match=message):
        Plan.from_bytes(Plan(1, movies).to_bytes(), "plan")
