"""Assignment of shards to tasks, and the shards of one task."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence

from configs.errors import ConfigError
from sharding.format.names import Kind, shard_name


def parse_task(text: str) -> tuple[int, int]:
    """Return task number and number of tasks of ``I/N``; tasks are counted from 0.

    Raises:
        ConfigError: ``text`` has another form.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--task: got {text!r}, want I/N with I from 0 to N-1, e.g. 0/4")
    return int(index), int(count)


def assign_shards(costs: Sequence[int], tasks: int) -> tuple[tuple[int, ...], ...]:
    """Assign shards to tasks: the most expensive first, each to the task with the lowest load.

    Args:
        costs: Cost of each shard, by shard number.
        tasks: Number of tasks.

    Returns:
        The shard numbers of each task, ascending. Each shard belongs to exactly one task; a task
        may be empty. The highest load is within 4/3 of the optimum.

    Raises:
        ValueError: ``tasks`` is below 1, or a cost is negative.
    """
    if tasks < 1 or min(costs, default=0) < 0:
        raise ValueError(f"got {tasks} tasks, costs from {min(costs, default=0)}; want >=1, >=0")
    assigned: list[list[int]] = [[] for _ in range(tasks)]
    # The shard count and the task number break ties, so the result is deterministic.
    heap = [(0, 0, task) for task in range(tasks)]
    for shard in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        cost, count, task = heap[0]
        assigned[task].append(shard)
        heapq.heapreplace(heap, (cost + costs[shard], count + 1, task))
    return tuple(tuple(sorted(numbers)) for numbers in assigned)


def incomplete_tasks(costs: Sequence[int], tasks: int, missing: Collection[int]) -> tuple[int, ...]:
    """Return the tasks that have a missing shard, ascending.

    Args:
        costs: What each shard of the set costs, by its number.
        tasks: Number of tasks.
        missing: Shards that are not done.
    """
    missing_shards = set(missing)
    assigned = assign_shards(costs, tasks)
    return tuple(task for task, numbers in enumerate(assigned) if missing_shards & set(numbers))


def task_shards(
    costs: Sequence[int], kind: Kind, *, task: tuple[int, int] = (0, 1), only: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return the shards of one task, ascending; with ``only``, those of them that it names.

    The assignment covers the complete set, so it does not depend on which shards are done.

    Args:
        costs: Cost of each shard of the set, by shard number.
        kind: Kind of the set, for the names of its shards.
        task: ``(i, n)``: task i of n, counted from 0.
        only: Names such as ``frames-00007``, or numbers such as ``7``; empty means all.

    Raises:
        ConfigError: the set has no shard of that name.
    """
    numbers = assign_shards(costs, task[1])[task[0]]
    if not only:
        return numbers
    names = {shard_name(kind, number): number for number in range(len(costs))}
    names |= {str(number): number for number in range(len(costs))}
    unknown = [name for name in only if name not in names]
    if unknown:
        first, last = shard_name(kind, 0), shard_name(kind, len(costs) - 1)
        raise ConfigError(f"--only: no shard {unknown[0]!r}; the set has {first} to {last}")
    selected = {names[name] for name in only}
    return tuple(number for number in numbers if number in selected)
