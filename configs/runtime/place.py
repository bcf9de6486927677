"""Place of a process in a world whose starter sets other variables than torch reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Place of this process in the world that srun or mpirun has started."""

    starter: str
    """What started the process, for messages: ``srun`` or a kind of ``mpirun``."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Processes on this node."""

    master_addr: str
    """Host of rank 0."""

    master_port: int
    """The same on all ranks, and different in the jobs of a node where the job has an id."""

    def variables(self) -> dict[str, str]:
        """Return what a launcher would have set, as torch and Accelerate read it."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def given_port(environment: Mapping[str, str]) -> int | None:
    """Return the port that ``MASTER_PORT`` names; None if it is not set.

    Raises:
        ValueError: it is no number from 0 to 65535.
    """
    text = environment.get("MASTER_PORT", "")
    if text and not (text.isdecimal() and int(text) < 65_536):
        raise ValueError(f"MASTER_PORT: got {text}, want a port number")
    return int(text) if text else None
