from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError
from sharding.assign import assign_shards, parse_task, task_shards
from sharding.format.names import Kind, shard_name

costs = st.lists(st.integers(0, 1000), max_size=40)


@given(costs, st.integers(1, 12))
def test_every_shard_is_assigned_to_exactly_one_task(costs: list[int], tasks: int) -> None:
    assigned = assign_shards(costs, tasks)
    assert len(assigned) == tasks
    assert sorted(shard for task in assigned for shard in task) == list(range(len(costs)))
    assert all(list(task) == sorted(task) for task in assigned)


@given(costs, st.integers(1, 12))
def test_no_task_costs_more_than_the_mean_plus_the_most_expensive_shard(
    costs: list[int], tasks: int
) -> None:
    loads = [sum(costs[shard] for shard in task) for task in assign_shards(costs, tasks)]
    assert max(loads) <= sum(costs) / tasks + max(costs, default=0)


@given(st.integers(0, 40), st.integers(1, 12))
def test_equal_shards_are_assigned_evenly(n: int, tasks: int) -> None:
    sizes = [len(task) for task in assign_shards([0] * n, tasks)]
    assert max(sizes) - min(sizes) <= 1


def test_the_assignment_is_stable_across_releases() -> None:
    assert assign_shards([5, 9, 1, 1, 7], 2) == ((1, 2, 3), (0, 4))


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "0/0", "1/2/3"])
def test_a_task_is_an_index_below_a_count(text: str) -> None:
    assert parse_task("1/2") == (1, 2)
    with pytest.raises(ConfigError, match="--task: got"):
        parse_task(text)


kinds: st.SearchStrategy[Kind] = st.sampled_from(["frames", "features"])


@given(st.data(), costs.filter(bool), st.integers(1, 6), kinds)
def test_only_selects_each_named_shard_in_the_one_task_that_owns_it(
    data: st.DataObject, costs: list[int], tasks: int, kind: Kind
) -> None:
    numbers = data.draw(st.lists(st.integers(0, len(costs) - 1), min_size=1))
    only = [str(n) if data.draw(st.booleans()) else shard_name(kind, n) for n in numbers]
    selected = [task_shards(costs, kind, task=(index, tasks), only=only) for index in range(tasks)]
    assert sorted(number for task in selected for number in task) == sorted(set(numbers))
    for task, owned in zip(selected, assign_shards(costs, tasks), strict=True):
        assert set(task) <= set(owned)
        assert list(task) == sorted(task)


@given(costs, st.integers(1, 6), kinds)
def test_a_task_without_only_has_all_its_assigned_shards(
    costs: list[int], tasks: int, kind: Kind
) -> None:
    for index, owned in enumerate(assign_shards(costs, tasks)):
        assert task_shards(costs, kind, task=(index, tasks)) == owned


@pytest.mark.parametrize("name", ["3", "-1", "features-00003", "frames-00000", "00001", ""])
def test_an_unknown_shard_name_is_refused_with_the_range_of_valid_names(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task_shards([1, 1, 1], "features", only=["1", name])
    assert str(caught.value) == (
        f"--only: no shard {name!r}; the set has features-00000 to features-00002"
    )
