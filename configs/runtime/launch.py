"""Rank, world, device and collectives of a process. No other module imports Accelerate.

``start`` creates a ``DistributedContext`` from the launcher's environment and the configuration.
Where they differ in precision, compilation or accumulation, the configuration decides. Accelerate's
``ACCELERATE_*`` variables come from its command line or from the user's default config file. Only
the choice of the CPU is taken from them.

Accelerate never sees the data stream: models and optimisers are prepared, batches are not.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs.errors import ConfigError, MachineError
from configs.runtime.network import interface_towards, interfaces, own_name_is_local
from configs.runtime.place import given_port
from configs.runtime.slurm_step import hosts_of
from configs.runtime.world import World, adopt_place, count_ranks, world_from_environment

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

# torch reads this when it is imported, which can be before ``start``. Without it DDP would warn on
# every rank of the graph search that ``_make_accelerator`` requests on purpose.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}

_RENDEZVOUS_TIMEOUT_S = 590.0
"""Longest wait for the other ranks, at the start and in a collective. Not 600: Accelerate passes on
no value that equals a default of its own, and torch then waits for 1,800 s."""

_LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

_FOREIGN_LAUNCHERS = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL")
"""Prefixes of MPI variables from which Accelerate would form a world."""


def _choose_interface(world: World) -> None:
    """Let gloo use the interface that reaches the other nodes, where their own names do not."""
    here = _local_size(default=world.size)
    if world.size <= here or os.environ.get("GLOO_SOCKET_IFNAME") or not own_name_is_local():
        return
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    name = interface_towards((os.environ.get("MASTER_ADDR", ""), *hosts_of(nodes)))
    if name is None:
        raise MachineError(
            f"rank {world.rank}: this node's own name means a loopback address, and no interface "
            f"towards the other nodes was found among {', '.join(interfaces()) or 'none'}; set "
            "GLOO_SOCKET_IFNAME to the network between the nodes"
        )
    os.environ["GLOO_SOCKET_IFNAME"] = name


def _local_size(default: int) -> int:
    """Return the number of ranks on this node, where the launcher has set it."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(given) if given.isdecimal() else default


def node_disk() -> Path:
    """Return the folder of this node for temporary data of the job.

    ``SLURM_TMPDIR`` if that folder exists, else ``TMPDIR`` or the system's temporary folder.
    """
    slurm = os.environ.get("SLURM_TMPDIR")
    return Path(slurm if slurm and Path(slurm).is_dir() else tempfile.gettempdir())


class DistributedContext:
    """Connection of this process to the other ranks, from ``start`` to ``close``.

    All ranks must call the collective methods (``backward``, ``any_rank``, ``all_reduce_sum``,
    ``all_gather``, ``all_gather_bytes``, ``barrier``) in the same order.
    """

    def __init__(self, accelerator: Any, world: World, *, compiled: bool = False) -> None:
        import torch

        self.world = world
        self._compiled = compiled
        device: torch.device = accelerator.device
        # With several ranks Accelerate's device is "cpu:0", which differs from torch's "cpu".
        self.device = torch.device("cpu") if device.type == "cpu" else device
        self._accelerator = accelerator

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and wrap it in mixed precision and, with several ranks, DDP.

        DDP copies rank 0's weights to all ranks. Outputs are float32 in every precision.
        """
        if self._compiled:
            # In place, not torch.compile(model): the names of the parameters do not change.
            model.compile()
        prepared: nn.Module = self._accelerator.prepare_model(model)
        return prepared

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Wrap the optimiser of a prepared model. With fp16 it skips steps that overflow."""
        prepared: torch.optim.Optimizer = self._accelerator.prepare_optimizer(optimizer)
        return prepared

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, a scalar, to those of the model.

        This method divides the loss by ``accumulation``, and DDP averages gradients over the ranks.
        For the mean over a global batch of weight W, the loop therefore passes
        ``sum(w * l) * world.size * accumulation / W``. The step is then the same on any number of
        ranks.
        """
        self._accelerator.backward(loss)

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Return the context for forward and backward of one micro-batch.

        Ranks exchange gradients in the last micro-batch of a step only.
        """
        if last:
            return nullcontext()
        no_sync: AbstractContextManager[None] = self._accelerator.no_sync(model)
        return no_sync

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is true on any rank, by one small all-reduce."""
        import torch

        # A CPU tensor: the all-reduce uses gloo and does not wait for the GPU's queue.
        return tuple((self.all_reduce_sum(torch.tensor(flags, dtype=torch.int32)) > 0).tolist())

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks, as a new tensor of the same shape, dtype and device."""
        import torch.distributed as dist

        total = values.detach().clone()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total

    def all_gather(self, values: Tensor) -> Tensor:
        """Return ``[size * n, …]`` from ``[n, …]`` of every rank, in the order of the ranks.

        All ranks pass the same shape and dtype.
        """
        import torch
        import torch.distributed as dist

        values = values.detach().contiguous()
        if self.world.size == 1:
            return values.clone()
        slices = [torch.empty_like(values) for _ in range(self.world.size)]
        dist.all_gather(slices, values)
        return torch.cat(slices)

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the data of every rank, in the order of the ranks; lengths may differ."""
        import torch

        lengths = self.all_gather(torch.tensor([len(data)])).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = self.all_gather(padded).view(len(lengths), -1)
        return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        import torch

        self.all_reduce_sum(torch.zeros(1))

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the module that was passed to ``prepare_model``, with its trained weights.

        Its forward keeps the mixed precision. Removing it would change the model in training.
        """
        bare: nn.Module = self._accelerator.unwrap_model(model)
        return bare

    def clip_grad_norm(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale all gradients so that their joint norm is at most ``max_norm``.

        Returns:
            The norm before, a scalar.
        """
        norm: Tensor = self._accelerator.clip_grad_norm_(parameters, max_norm)
        return norm

    def scaler_state(self) -> dict[str, Any]:
        """Return the loss scaler's state of fp16 for a checkpoint; empty in other precisions."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Restore what ``scaler_state`` returned."""
        if state and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state)

    def close(self) -> None:
        """Leave the process group. No collective may be called after it. Safe to call twice.

        It also clears Accelerate's global state, so that ``start`` can be called again.
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
    section: Literal["training", "encoder"] = "training",
) -> DistributedContext:
    """Join the launcher's world and wait for all its ranks.

    Args:
        device: ``cpu``, ``cuda``, or ``auto``: a GPU if torch finds one, unless
            ``accelerate launch`` was started with ``--cpu``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        accumulation: Forward passes per optimiser step.
        expected_world_size: Number of ranks to require; None accepts any.
        threads: CPU threads of this process for arithmetic; 0 is torch's default.
        compiled: Run prepared models through ``torch.compile``.
        section: Section of the configuration that contains device and precision.

    Raises:
        ConfigError: The number of ranks differs from the expected one, the device does not exist
            or does not support the precision, or ``compiled`` finds no compiler.
        MachineError: The ranks cannot reach each other.
    """
    import torch

    default_threads()  # before the number is changed
    world = world_from_environment()
    adopt_place()
    _check_world(world, expected_world_size)
    _choose_interface(world)
    use_cpu = _choose_cpu(device, section)
    _check_device(world, precision, section, use_cpu=use_cpu)
    if compiled:
        _check_compiler()
    _check_launcher(precision)
    _warn_if_alone(world)
    if world.size > 1:
        logger.info("waiting for %d ranks, at most %g s", world.size, _RENDEZVOUS_TIMEOUT_S)
    threads = default_threads() if threads == 0 else threads
    with _clean_environment(threads):
        accelerator = _make_accelerator(world, precision, accumulation, use_cpu=use_cpu)
    launch = DistributedContext(accelerator, world, compiled=compiled)
    torch.set_num_threads(threads)
    logger.info(
        "world %d   device %s   precision %s   threads %d",
        *(world.size, launch.device, precision, threads),
    )
    return launch


@functools.cache
def default_threads() -> int:
    """Return torch's number of threads before ``start`` or a model's size has changed it.

    It is ``OMP_NUM_THREADS`` where that is a number, else the number of cores of this process.
    """
    import torch

    return torch.get_num_threads()


def _check_world(world: World, expected_world_size: int | None) -> None:
    if expected_world_size is not None and world.size != expected_world_size:
        raise ConfigError(
            f"expected_world_size: launched {count_ranks(world.size)}, want {expected_world_size}; "
            "start them with srun, or with `accelerate launch` and an accelerate/ file of "
            f"`movienet-shard presets` (`--cpu --num_processes {expected_world_size}` forms "
            "worlds of one), or change training.expected_world_size"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world.size > 1 and missing:
        raise ConfigError(
            f"environment: WORLD_SIZE={world.size} without {', '.join(missing)}; "
            "start the ranks with `accelerate launch` or `torchrun`"
        )
    try:
        given_port(os.environ)
    except ValueError as error:
        raise ConfigError(f"environment: {error}") from None


def _choose_cpu(device: str, section: str) -> bool:
    """Return True for the CPU, False for a GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"{section}.device: got 'cuda', but torch finds no GPU on this machine; check "
            f"`nvidia-smi` and CUDA_VISIBLE_DEVICES, or set {section}.device to 'auto' or 'cpu'"
        )
    if device == "auto":
        launcher_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        return launcher_cpu or not torch.cuda.is_available()
    return device == "cpu"


def _check_device(world: World, precision: str, section: str, *, use_cpu: bool) -> None:
    import torch

    if use_cpu:
        if precision == "fp16":
            # Accelerate would train in fp32 without a warning.
            raise ConfigError(f"{section}.precision: got 'fp16' on the CPU, want 'fp32' or 'bf16'")
        return
    if precision == "bf16" and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name()
        raise ConfigError(f"{section}.precision: got 'bf16' on {name}, want 'fp16' or 'fp32'")
    gpus = torch.cuda.device_count()
    local_ranks = _local_size(default=world.local_rank + 1)
    if gpus == 1 and local_ranks > 1 and _gpus_of_step() >= local_ranks:
        os.environ["LOCAL_RANK"] = "0"  # Slurm shows each rank its own GPU, as number 0
        return
    if local_ranks > gpus:
        raise ConfigError(
            f"{section}.device: launched {count_ranks(local_ranks)} of world {world.size} on a "
            f"machine with {gpus} GPU(s), want at most one rank per GPU; pass "
            f"`--num_processes {gpus}`, or set {section}.device to 'cpu'"
        )


def _gpus_of_step() -> int:
    """Return how many GPUs a Slurm step has on this node; 0 outside one."""
    if not os.environ.get("SLURM_STEP_NUM_TASKS"):
        return 0
    gpus = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS") or ""
    return len([gpu for gpu in gpus.split(",") if gpu])


def _check_compiler() -> None:
    names = [os.environ.get("CXX"), "g++", "c++", "clang++"]
    if not any(shutil.which(name) for name in names if name):
        raise ConfigError(
            "training.compile: got true without a C++ compiler on this machine; install g++, load "
            "its module or set CXX, or set training.compile to false"
        )


def _check_launcher(precision: str) -> None:
    """Reject unsupported modes of ``accelerate launch``; warn of settings the config overrides."""
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ConfigError(
                f"accelerate launch: got {name}, want plain data parallelism; pass "
                "`--config_file $(movienet-shard presets accelerate/gpu)`"
            )
    launcher_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher_precision not in ("no", _PRECISION[precision]):
        logger.warning(
            "accelerate launch: ignoring its mixed precision %s, the configuration sets %s",
            *(launcher_precision, precision),
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        logger.warning("accelerate launch: ignoring its dynamo backend, training.compile decides")


def _warn_if_alone(world: World) -> None:
    """Warn of a launch of several ranks that started a single one."""
    if world.size > 1 or os.environ.get("RANK"):
        return
    if "ACCELERATE_USE_CPU" in os.environ and os.environ.get("MASTER_ADDR"):
        logger.warning(
            "accelerate launch: this process is the only rank; `--num_processes N` forms a world "
            "only with `--config_file $(movienet-shard presets accelerate/cpu-2)`"
        )
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and "SLURM_STEP_NUM_TASKS" not in os.environ:
        logger.warning(
            "Slurm: the job has %s tasks, but this process is the only rank; start it with srun",
            tasks,
        )


def _make_accelerator(world: World, precision: str, accumulation: int, *, use_cpu: bool) -> Any:
    import torch.distributed as dist
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )

    # Accelerate forms a process group even in a world of one, if torchrun has started it.
    has_group = bool(os.environ.get("LOCAL_RANK"))
    backend = "gloo" if use_cpu else "cuda:nccl,cpu:gloo"
    timeout = timedelta(seconds=_RENDEZVOUS_TIMEOUT_S)
    handlers: list[Any] = []
    if has_group:
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
        # Without it DDP reorders its buckets after the first step of each process, and a resumed
        # run on three or more ranks would sum gradients in another order than an undisturbed one.
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    steps = GradientAccumulationPlugin(
        num_steps=accumulation, adjust_scheduler=False, sync_with_dataloader=False
    )
    try:
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
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"rank {world.rank} of {world.size}: no rendezvous at {address}: {reason}; "
            "check that every rank was started and that this port is free and reachable"
        ) from error


def _leave_world() -> None:
    """Destroy the process group and Accelerate's global state, complete or not."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState

    # DDP holds the process group in reference cycles: collect them before it is destroyed.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def _clean_environment(threads: int) -> Iterator[None]:
    """Hide variables that change Accelerate's behaviour, and restore them after the block.

    Accelerate reads some variables as numbers and fails where they are empty. OpenMP allows lists
    such as ``4,3,2`` in ``OMP_NUM_THREADS``. Accelerate would also change the threads without it.
    """
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("ACCELERATE_", *_FOREIGN_LAUNCHERS))
        or (name in _LAUNCHER_NAMES and not value)
    }
    omp_threads = os.environ.get("OMP_NUM_THREADS")
    for name in hidden:
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        os.environ.update(hidden)
        if omp_threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = omp_threads
