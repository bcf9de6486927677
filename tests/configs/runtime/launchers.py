"""The launchers of the README's table, and the environment that each gives to its ranks."""

from __future__ import annotations

import re

from tests.snippets import CHECKOUT

README = CHECKOUT / "configs" / "README.md"
_ROW = re.compile(r"\| ([^|]+) \| `([^`|]+)` \| ([^|]+) \|")


def launcher_rows() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return command and variables by launcher."""
    table = README.read_text().partition("| launcher | command")[2].partition("\n\n")[0]
    return {
        row[1].strip("`"): (row[2], tuple(re.findall(r"`(\w+)`", row[3])))
        for row in _ROW.finditer(table)
    }


def rank_environment(launcher: str, rank: int) -> dict[str, str]:
    """Return the variables of a row as its launcher sets them for one of two ranks on a node."""
    values = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29777",
        "PMIX_NAMESPACE": "1586757633",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "12345",
    }
    return {
        name: values.get(name, _rank_or_size(name, rank)) for name in launcher_rows()[launcher][1]
    }


def _rank_or_size(name: str, rank: int) -> str:
    return "2" if name.endswith(("SIZE", "NRANKS")) else str(rank)
