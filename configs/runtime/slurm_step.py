"""The world that a Slurm step forms: one rank per task, without a launcher.

Only a step has ``SLURM_STEP_NUM_TASKS``. The batch shell has ``SLURM_PROCID`` and ``SLURM_NTASKS``
as well, although it is a single process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from configs.runtime.place import Place, given_port


def step_place(environment: Mapping[str, str]) -> Place | None:
    """Return this process's place in a Slurm step; None outside a step of several tasks.

    Args:
        environment: Variables. ``MASTER_ADDR`` and ``MASTER_PORT`` are kept if set.

    Raises:
        ValueError: the variables of the step are incomplete or no numbers.
    """
    size = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if not size.isdecimal() or int(size) < 2:
        return None
    rank, local_rank = environment.get("SLURM_PROCID", ""), environment.get("SLURM_LOCALID", "")
    if not (rank.isdecimal() and local_rank.isdecimal()):
        raise ValueError(
            f"a Slurm step of {size} tasks with SLURM_PROCID={rank}, SLURM_LOCALID={local_rank}, "
            "want numbers; start the ranks with srun"
        )
    node = int(environment.get("SLURM_NODEID", "0"))
    job = int(environment.get("SLURM_JOB_ID", "0"))
    return Place(
        starter="srun",
        rank=int(rank),
        size=int(size),
        local_rank=int(local_rank),
        local_size=tasks_on_node(environment.get("SLURM_STEP_TASKS_PER_NODE", size), node),
        master_addr=environment.get("MASTER_ADDR")
        or hosts_of(environment.get("SLURM_STEP_NODELIST", "localhost"))[0],
        master_port=given_port(environment) or 20_000 + job % 10_000,
    )


def hosts_of(nodes: str) -> tuple[str, ...]:
    """Return the hosts of a list such as ``tb[1-3,07],login1``."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if match is None:
            hosts.append(part)
            continue
        for numbers in match[2].split(","):
            first, _, last = numbers.partition("-")
            width = len(first)
            hosts += [
                f"{match[1]}{number:0{width}d}{match[3]}"
                for number in range(int(first), int(last or first) + 1)
            ]
    return tuple(hosts)


def tasks_on_node(counts: str, node: int) -> int:
    """Return the tasks of a node from a list such as ``2(x3),1``."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"tasks per node: got {counts!r}")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded[node] if node < len(expanded) else expanded[-1]
