"""Position of a process among the ranks, from the environment alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

from configs.errors import ConfigError
from configs.runtime.mpi_world import mpi_place
from configs.runtime.place import Place
from configs.runtime.slurm_step import step_place


@dataclass(frozen=True)
class World:
    """Position of this process among all processes of the run."""

    rank: int = 0
    """0 to size - 1."""

    size: int = 1
    """Number of processes on all machines."""

    local_rank: int = 0
    """Rank among the processes of this machine. It selects the GPU."""


def world_from_environment() -> World:
    """Return the world of a launcher, of mpirun or of a Slurm step, else a world of one.

    Reads ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` as ``accelerate launch``, ``torchrun`` and
    ``deepspeed`` set them, else the variables of mpirun or srun, without imports and without
    communication.

    Raises:
        ConfigError: Some of the variables are missing, contradict each other, or are not valid
            ranks.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if "RANK" not in given and (place := _place()):
        _check_size(place, given.get("WORLD_SIZE"))
        return World(place.rank, place.size, place.local_rank)
    if not given:
        return World()
    got = ", ".join(f"{name}={value}" for name, value in given.items())
    if missing := [name for name in names if name not in given]:
        raise ConfigError(
            f"environment: {got} set without {', '.join(missing)}; start the ranks with "
            "`accelerate launch`, `torchrun`, srun or mpirun, or unset the variables for one rank"
        )
    try:
        rank, size, local_rank = (int(given[name]) for name in names)
    except ValueError:
        rank, size, local_rank = -1, 0, -1
    if not (0 <= rank < size and 0 <= local_rank < size):
        raise ConfigError(f"environment: got {got}; want 0 <= LOCAL_RANK, RANK < WORLD_SIZE")
    return World(rank, size, local_rank)


def _place() -> Place | None:
    """Return this process's place in a world of mpirun or srun, the inner one first."""
    try:
        return mpi_place(os.environ) or step_place(os.environ)
    except ValueError as error:
        raise ConfigError(f"environment: {error}") from None


def _check_size(place: Place, world_size: str | None) -> None:
    """Compare with a ``WORLD_SIZE`` that a script has exported for its ranks."""
    if world_size not in (None, str(place.size)):
        raise ConfigError(
            f"environment: {place.starter} started {count_ranks(place.size)}, but WORLD_SIZE is "
            f"{world_size}; unset WORLD_SIZE, or start as many ranks"
        )


def adopt_place() -> None:
    """Set for torch and Accelerate what a launcher would have set, in a world without one."""
    if not os.environ.get("RANK") and (place := _place()):
        os.environ.update(place.variables())


def count_ranks(number: int) -> str:
    """Return ``1 rank`` or ``N ranks``."""
    return "1 rank" if number == 1 else f"{number} ranks"
