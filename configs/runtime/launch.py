"""Which process of how many this is, and what binds them together; the only user of Accelerate.

``start`` makes a ``DistributedContext`` from the launcher's environment and the configuration.
Where the two disagree on precision, compilation or accumulation, the config holds: of Accelerate's
own ``ACCELERATE_*`` variables, which come from its command line and from the user's default config
file as well, only the choice of the CPU is followed.

Accelerate never sees the data stream: models and optimisers are prepared, batches are not.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError, MachineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}

_MEETING_TIMEOUT_S = 600.0
"""Longest wait for the other ranks, at the start and in a collective."""

_FOREIGN_LAUNCHERS = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL")
"""Variables of MPI that Accelerate would take for a world of its own."""


@dataclass(frozen=True)
class World:
    """Place of this process among those that train together."""

    rank: int = 0
    """0 to size - 1."""

    size: int = 1
    """Processes in all, over all machines."""

    local_rank: int = 0
    """Place among the processes of this machine; picks the GPU."""


def world_from_environment() -> World:
    """Return the world that ``accelerate launch`` or ``torchrun`` has set; alone without them.

    Reads ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; imports nothing, waits for nobody.

    Raises:
        ConfigError: only some of them are set, or they are no such numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given:
        return World()
    if missing := [name for name in names if name not in given]:
        raise ConfigError(
            f"environment: {', '.join(given)} set without {', '.join(missing)}; "
            "start the ranks with `accelerate launch` or `torchrun`, or unset them"
        )
    try:
        rank, size, local_rank = (int(given[name]) for name in names)
    except ValueError:
        rank, size, local_rank = -1, 0, -1
    if not (0 <= rank < size and 0 <= local_rank < size):
        got = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(f"environment: got {got}; want 0 <= LOCAL_RANK, RANK < WORLD_SIZE")
    return World(rank, size, local_rank)


def node_disk() -> Path:
    """Return where this node keeps what need not outlive the job.

    ``SLURM_TMPDIR`` where there is one, else ``TMPDIR`` or the system's own.
    """
    slurm = os.environ.get("SLURM_TMPDIR")
    return Path(slurm if slurm and Path(slurm).is_dir() else tempfile.gettempdir())


class DistributedContext:
    """One process's hold on the others; made by ``start``, ended by ``close``.

    Every method that talks to other ranks must be called by all of them, in the same order.
    """

    def __init__(self, accelerator: Any, world: World, *, compiled: bool = False) -> None:
        import torch

        self.world = world
        self._compiled = compiled
        device: torch.device = accelerator.device
        # With several ranks Accelerate says "cpu:0".
        self.device = torch.device("cpu") if device.type == "cpu" else device
        self._accelerator = accelerator

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Move to the device; wrap in mixed precision and, with several ranks, in DDP.

        DDP takes rank 0's weights for all. Outputs come back as float32 in every precision. With
        ``compiled`` the model compiles itself where it stands: its parameters keep their names.
        """
        if self._compiled:
            model.compile()
        prepared: nn.Module = self._accelerator.prepare_model(model)
        return prepared

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Wrap the optimiser of a prepared model; with fp16 it skips steps that overflow."""
        prepared: torch.optim.Optimizer = self._accelerator.prepare_optimizer(optimizer)
        return prepared

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, a scalar, to those of the model.

        Scaling: the loss is divided by ``accumulation`` here, and DDP averages gradients over the
        ranks. For the mean over a global batch of weight W, the loop therefore passes
        ``sum(w * l) * world.size * accumulation / W``; then the step is the same on any number of
        ranks.
        """
        self._accelerator.backward(loss)

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; ranks exchange gradients in the last."""
        if last:
            return nullcontext()
        quiet: AbstractContextManager[None] = self._accelerator.no_sync(model)
        return quiet

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Return of each flag whether it is true on any rank; one small all-reduce for all.

        It goes over the CPU's network, so that it does not wait for the GPU's queue.
        """
        import torch

        return tuple((self.all_reduce_sum(torch.tensor(flags, dtype=torch.int32)) > 0).tolist())

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks, as a new tensor of the same shape, dtype and device."""
        import torch.distributed as dist

        total = values.detach().clone()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total

    def all_gather(self, values: Tensor) -> Tensor:
        """Return ``[size * n, …]``: every rank's ``[n, …]`` in order of rank; shapes are equal."""
        import torch
        import torch.distributed as dist

        values = values.detach().contiguous()
        if self.world.size == 1:
            return values.clone()
        parts = [torch.empty_like(values) for _ in range(self.world.size)]
        dist.all_gather(parts, values)
        return torch.cat(parts)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        import torch

        self.all_reduce_sum(torch.zeros(1))

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the module that ``prepare_model`` was given, with its trained weights.

        It stays in mixed precision: taking that away would change the model that is in training.
        """
        bare: nn.Module = self._accelerator.unwrap_model(model)
        return bare

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale gradients down to ``max_norm`` over all of them; return the norm before."""
        norm: Tensor = self._accelerator.clip_grad_norm_(parameters, max_norm)
        return norm

    def scaler_state(self) -> dict[str, Any]:
        """Return the loss scale of fp16 for a checkpoint; empty in other precisions."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Continue with a loss scale that ``scaler_state`` returned."""
        if state and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state)

    def close(self) -> None:
        """Leave the world: no rank may be called after it. Safe to call twice.

        Accelerate keeps its state in the process; it is cleared, so that ``start`` may be called
        again, as tests do.
        """
        if self._accelerator is None:
            return
        self._accelerator.free_memory()
        self._accelerator = None
        _leave_world()


def start(
    *,
    device: str,
    precision: str,
    accumulation: int,
    expected_world_size: int | None,
    threads: int = 0,
    compiled: bool = False,
) -> DistributedContext:
    """Join the world that the launcher set up; waits until all ranks are there.

    Args:
        device: ``auto`` (a GPU where there is one, unless ``accelerate launch --cpu`` was said),
            ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        accumulation: Forward passes an optimiser step.
        expected_world_size: Refuse another number of ranks; None takes any.
        threads: Arithmetic threads of this process on the CPU; 0 leaves torch's choice.
        compiled: Run prepared models through ``torch.compile``.

    Raises:
        ConfigError: another number of ranks, no such device, one that cannot do the precision, or
            no compiler.
        MachineError: the ranks do not reach each other.
    """
    import torch

    world = world_from_environment()
    _check_world(world, expected_world_size)
    use_cpu = _choose_cpu(device)
    _check_device(world, precision, use_cpu=use_cpu)
    if compiled:
        _check_compiler()
    _heed_launcher(precision)
    # Accelerate sets a number of its own in some worlds.
    threads = threads or torch.get_num_threads()
    accelerator = _make_accelerator(world, precision, accumulation, use_cpu=use_cpu)
    launch = DistributedContext(accelerator, world, compiled=compiled)
    torch.set_num_threads(threads)
    logger.info(
        "world %d   device %s   precision %s   threads %d",
        *(world.size, launch.device, precision, threads),
    )
    return launch


def _check_world(world: World, expected_world_size: int | None) -> None:
    if expected_world_size is not None and world.size != expected_world_size:
        raise ConfigError(
            f"expected_world_size: launched {_ranks(world.size)}, want {expected_world_size}; "
            "start them with `accelerate launch` and a file of configs/accelerate "
            f"(`--cpu --num_processes {expected_world_size}` forms worlds of one), or "
            "change training.expected_world_size"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world.size > 1 and missing:
        raise ConfigError(
            f"environment: WORLD_SIZE={world.size} without {', '.join(missing)}; "
            "start the ranks with `accelerate launch` or `torchrun`"
        )


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def _choose_cpu(device: str) -> bool:
    """Return True for the CPU, False for a GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: got 'cuda', but torch finds no GPU here; check `nvidia-smi` and "
            "CUDA_VISIBLE_DEVICES, or set device to 'auto' or 'cpu'"
        )
    if device == "auto":
        asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        return asked or not torch.cuda.is_available()
    return device == "cpu"


def _check_device(world: World, precision: str, *, use_cpu: bool) -> None:
    import torch

    if use_cpu:
        if precision == "fp16":
            # Accelerate would train in fp32 and say nothing.
            raise ConfigError(
                "precision: got 'fp16' on the CPU, which trains in 'fp32' or 'bf16' only"
            )
        return
    if precision == "bf16" and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name()
        raise ConfigError(f"precision: {name} has no bf16 arithmetic; want 'fp16' or 'fp32'")
    gpus = torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or world.local_rank + 1)
    if here > gpus:
        raise ConfigError(
            f"device: launched {_ranks(here)} of world {world.size} on a machine with {gpus} "
            f"GPU(s); want `--num_processes {gpus}`, or device 'cpu'"
        )


def _check_compiler() -> None:
    names = [os.environ.get("CXX"), "g++", "c++", "clang++"]
    if not any(shutil.which(name) for name in names if name):
        raise ConfigError(
            "training.compile: torch.compile finds no C++ compiler here; install g++, load its "
            "module or set CXX, or leave training.compile false"
        )


def _heed_launcher(precision: str) -> None:
    """Refuse what ``accelerate launch`` offers and we do not; warn of what the config overrides."""
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ConfigError(
                f"accelerate launch: got {name}, want plain data parallelism; pass "
                "`--config_file configs/accelerate/gpu.yaml`"
            )
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in ("no", _PRECISION[precision]):
        logger.warning(
            "accelerate launch asks for %s, the configuration for %s: the configuration holds",
            *(wanted, precision),
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        logger.warning("accelerate launch asks to compile the model: training.compile decides")


def _make_accelerator(world: World, precision: str, accumulation: int, *, use_cpu: bool) -> Any:
    import torch.distributed as dist
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    # A world of one that torchrun has started is a world to Accelerate too.
    several = "LOCAL_RANK" in os.environ
    backend = "gloo" if use_cpu else "cuda:nccl,cpu:gloo"
    patience = timedelta(seconds=_MEETING_TIMEOUT_S)
    handlers = [InitProcessGroupKwargs(backend=backend, timeout=patience)] if several else []
    steps = GradientAccumulationPlugin(
        num_steps=accumulation, adjust_scheduler=False, sync_with_dataloader=False
    )
    try:
        with _clean_environment(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
            return Accelerator(
                cpu=use_cpu,
                mixed_precision=_PRECISION[precision],
                gradient_accumulation_plugin=steps,
                kwargs_handlers=handlers,
                step_scheduler_with_optimizer=False,
            )
    except BaseException as error:
        _leave_world()
        if not isinstance(error, dist.DistError):
            raise
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"rank {world.rank} of {world.size}: no meeting at {place}: {reason}; "
            "check that every rank was started and that this port is free and reachable"
        ) from error


def _leave_world() -> None:
    """End the process group and Accelerate's state of this process, whole or half made."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState

    # DDP holds the process group in reference cycles: let them go before it is destroyed.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def _clean_environment() -> Iterator[None]:
    """Hide what would let Accelerate decide by itself; all is back after the block."""
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("ACCELERATE_", *_FOREIGN_LAUNCHERS))
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
