"""The world that ``mpirun`` forms: one rank per process, without MPI itself.

Open MPI, MPICH, Intel MPI and MVAPICH set rank and size of each process. None of them sets the
address of rank 0, which is known only where all processes are on one node.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from configs.runtime.place import Place, given_port


@dataclass(frozen=True)
class _Names:
    """Variables of one implementation."""

    starter: str
    rank: str
    size: str
    local_rank: str
    local_size: str


_IMPLEMENTATIONS = (
    _Names(
        "mpirun of Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Names(
        "mpirun of MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    _Names(
        "mpirun of MPICH or Intel MPI",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
    ),
)

_DEFAULT_PORT = 29_500
"""Of torchrun and ``accelerate launch`` too."""


def mpi_place(environment: Mapping[str, str]) -> Place | None:
    """Return this process's place in a world of mpirun; None outside one of several processes.

    Args:
        environment: Variables. ``MASTER_ADDR`` and ``MASTER_PORT`` take precedence.

    Raises:
        ValueError: variables of this world are missing or no numbers. The message names them.
    """
    names = next((names for names in _IMPLEMENTATIONS if _is_world(environment, names)), None)
    if names is None:
        return None
    wanted = (names.rank, names.size, names.local_rank, names.local_size)
    if bad := [name for name in wanted if not environment.get(name, "").isdecimal()]:
        got = ", ".join(f"{name}={environment.get(name, '')}" for name in bad)
        raise ValueError(f"{names.starter}: got {got}, want numbers")
    rank, size, local_rank, local_size = (int(environment[name]) for name in wanted)
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if local_size == size else "")
    if not address:
        raise ValueError(
            f"{names.starter}: {size} ranks on several nodes without MASTER_ADDR, want the host of "
            "rank 0, e.g. `-x MASTER_ADDR=HOST` (Open MPI) or `-genv MASTER_ADDR HOST`"
        )
    port = given_port(environment) or _port_of_job(environment)
    return Place(names.starter, rank, size, local_rank, local_size, address, port)


def _is_world(environment: Mapping[str, str], names: _Names) -> bool:
    size = environment.get(names.size, "")
    # `srun --mpi=pmi2` sets PMI_RANK as well. Its step has the local ranks.
    is_step = "SLURM_STEP_NUM_TASKS" in environment and names.local_rank not in environment
    return size.isdecimal() and int(size) > 1 and not is_step


def _port_of_job(environment: Mapping[str, str]) -> int:
    """Return a port that all ranks derive alike: from Open MPI's job id, else the usual one."""
    job = environment.get("PMIX_NAMESPACE")
    return 20_000 + zlib.crc32(job.encode()) % 10_000 if job else _DEFAULT_PORT
