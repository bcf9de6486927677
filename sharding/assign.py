"""Shards to shares, shares to ranks, and the shards of one command."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from configs.errors import ConfigError
from sharding.format.names import Kind, shard_name


def parse_task(text: str) -> tuple[int, int]:
    """Return share and number of shares of ``I/N``, counted from 0.

    Raises:
        ConfigError: it is anything else.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--task: got {text!r}, want I/N with I from 0 to N-1, e.g. 0/4")
    return int(index), int(count)


def assign_shards(costs: Sequence[int], tasks: int) -> tuple[tuple[int, ...], ...]:
    """Deal shards to shares: the most expensive first, each to the share with the least so far.

    Args:
        costs: What each shard costs, by its number.
        tasks: How many shares.

    Returns:
        The shard numbers of each share, rising. Together they are all shards, each once; a share
        may be empty. The most expensive share is within 4/3 of the best possible one.

    Raises:
        ValueError: ``shares`` is below 1, or a cost is negative.
    """
    if tasks < 1 or min(costs, default=0) < 0:
        raise ValueError(f"got {tasks} shares, costs from {min(costs, default=0)}; want >=1, >=0")
    dealt: list[list[int]] = [[] for _ in range(tasks)]
    heap = [(0, 0, task) for task in range(tasks)]  # cost, shards, number: all ties are decided
    for shard in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        cost, count, task = heap[0]
        dealt[task].append(shard)
        heapq.heapreplace(heap, (cost + costs[shard], count + 1, task))
    return tuple(tuple(sorted(task)) for task in dealt)


def task_shards(
    costs: Sequence[int], kind: Kind, *, task: tuple[int, int] = (0, 1), only: Sequence[str] = ()
) -> tuple[int, ...]:
    """Return the shards of one task, rising; with ``only``, those of them that it names.

    Tasks are dealt from the complete set, so the result does not depend on which shards are done.

    Args:
        costs: What each shard of the set costs, by its number.
        kind: Kind of the set, for the names of its shards.
        task: ``(i, n)``: the i-th of n tasks, from 0.
        only: Names such as ``frames-00007``, or numbers such as ``7``; none means all.

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
