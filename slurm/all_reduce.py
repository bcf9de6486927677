"""``python -m slurm.all_reduce gloo|nccl``: one all-reduce over the tasks of a Slurm step."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

_MEETING_S = 60


def main(backend: str) -> None:
    """Meet the other tasks, sum a one of each, and print the seconds it took."""
    import torch
    import torch.distributed as dist

    start = time.monotonic()
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    dist.init_process_group(
        backend,
        init_method=f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_MEETING_S),
    )
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)
    if int(ones.item()) != size:
        raise RuntimeError(f"all-reduce: got {ones.item()}, want {size}")
    dist.destroy_process_group()
    print(f"{time.monotonic() - start:.1f}")  # noqa: T201  # read by the probe


if __name__ == "__main__":
    main(sys.argv[1])
