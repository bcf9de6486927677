"""Script that trains a linear model like the real loop, for the tests of launch.

``python two_ranks.py OUT [--steps N] [--pause SECONDS] …`` writes to OUT: ``checkpoint.pt`` (every
five steps and at a stop), ``attempt-N.json``, ``step`` (completed steps, while it runs), ``pid-R``
and, at the end, ``rank-R.json`` with this rank's weights.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import MovieNetError
from configs.runtime.attempt import Attempt
from configs.runtime.launch import DistributedContext, start
from configs.runtime.publish import publish_bytes
from configs.runtime.signals import StopRequest

ROWS, INPUTS, OUTPUTS = 12, 6, 3
MICRO_BATCHES = 2


def global_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, targets and weights of one step, the same in every world."""
    keyed = torch.Generator().manual_seed(step)
    rows = torch.randn(ROWS, INPUTS, generator=keyed)
    targets = torch.randn(ROWS, OUTPUTS, generator=keyed)
    weights = torch.rand(ROWS, generator=keyed)
    return rows, targets, weights


def slices(launch: DistributedContext) -> Iterator[tuple[slice, bool]]:
    """Yield the rows of each micro-batch of this rank, and whether it is the last one."""
    size = ROWS // launch.world.size // MICRO_BATCHES
    for micro in range(MICRO_BATCHES):
        first = (launch.world.rank * MICRO_BATCHES + micro) * size
        yield slice(first, first + size), micro == MICRO_BATCHES - 1


def take_step(
    launch: DistributedContext, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    rows, targets, weights = (tensor.to(launch.device) for tensor in global_batch(step))
    for micro, last in slices(launch):
        with launch.accumulate(model, last=last):
            errors = (model(rows[micro]) - targets[micro]).square().mean(1)
            scale = launch.world.size * MICRO_BATCHES / weights.sum()
            launch.backward((weights[micro] * errors).sum() * scale)
    launch.clip_grad_norm(model.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("out", type=Path)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--pause", type=float, default=0.0)
    options.add_argument("--device", default="cpu")
    options.add_argument("--precision", default="fp32")
    options.add_argument("--expected-world-size", type=int)
    arguments = options.parse_args()
    try:
        launch = start(
            device=arguments.device,
            precision=arguments.precision,
            accumulation=MICRO_BATCHES,
            expected_world_size=arguments.expected_world_size,
            threads=1,
        )
    except MovieNetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    with closing(launch), StopRequest() as stop:
        return train(launch, stop, arguments.out, steps=arguments.steps, pause=arguments.pause)


def train(
    launch: DistributedContext, stop: StopRequest, out: Path, *, steps: int, pause: float
) -> int:
    rank = launch.world.rank
    # Different weights on each rank: DDP must copy rank 0's to all.
    torch.manual_seed(rank)
    model = launch.prepare_model(nn.Linear(INPUTS, OUTPUTS))
    optimizer = launch.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    attempt = Attempt.begin(out) if rank == 0 else None
    publish_bytes(out / f"pid-{rank}", str(os.getpid()).encode())
    done = load(launch, model, optimizer, out)
    stopped = False
    while done < steps and not stopped:
        take_step(launch, model, optimizer, done)
        done += 1
        time.sleep(pause)
        (stopped,) = launch.any_rank(stop.requested)
        if rank == 0:
            if stopped or done % 5 == 0:
                save(launch, model, optimizer, done, out)
            publish_bytes(out / "step", str(done).encode())
    if attempt is not None:
        attempt.finish("interrupted" if stopped else "done", done, stop.reason)
    leave_result(launch, model, done, out)
    return 75 if stopped else 0


def save(
    launch: DistributedContext,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    done: int,
    out: Path,
) -> None:
    content = io.BytesIO()
    state = {
        "model": launch.unwrap(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": launch.scaler_state(),
        "step": done,
    }
    torch.save(state, content)
    publish_bytes(out / "checkpoint.pt", content.getvalue())


def load(
    launch: DistributedContext, model: nn.Module, optimizer: torch.optim.Optimizer, out: Path
) -> int:
    """Restore the checkpoint, if any, and return its step."""
    path = out / "checkpoint.pt"
    # All ranks must check before rank 0 writes the file: any_rank waits for all of them.
    if launch.any_rank(path.exists()) == (False,):
        return 0
    state = torch.load(path, weights_only=True)
    launch.unwrap(model).load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    launch.load_scaler_state(state["scaler"])
    return int(state["step"])


def leave_result(launch: DistributedContext, model: nn.Module, done: int, out: Path) -> None:
    bare = launch.unwrap(model)
    result = {
        "rank": launch.world.rank,
        "size": launch.world.size,
        "device": str(launch.device),
        "step": done,
        "weights": [value.tolist() for value in bare.state_dict().values()],
        "sum": launch.all_reduce_sum(torch.tensor([1.0, launch.world.rank])).tolist(),
        "gathered": launch.all_gather(torch.tensor([[launch.world.rank]])).tolist(),
        "output": str(model(torch.zeros(1, INPUTS, device=launch.device)).dtype),
        "threads": torch.get_num_threads(),
        "variables": sorted(os.environ),
    }
    launch.barrier()
    publish_bytes(out / f"rank-{launch.world.rank}.json", json.dumps(result).encode())


if __name__ == "__main__":
    sys.exit(main())
