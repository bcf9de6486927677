"""CPU threads of a model's arithmetic where the configuration leaves the choice.

A matrix product is divided among all threads, which wait for the last one. With matrices of some
thousand values the wait is longer than the work, and where other processes use the cores it lasts
until the last thread has had its turn: several times the duration of the step.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from configs.runtime.launch import default_threads

logger = logging.getLogger(__name__)

_PARAMETERS_PER_THREAD = 1_000_000


def threads_for(n_parameters: int, *, limit: int) -> int:
    """Return one thread per million parameters, at least 1 and at most ``limit``.

    The same for the same model, and never measured: the number of threads determines the last bits
    of the weights, which must be equal in an undisturbed and a resumed run.
    """
    return max(1, min(limit, n_parameters // _PARAMETERS_PER_THREAD))


def choose_threads(model: nn.Module, device: torch.device, configured: int) -> None:
    """Set the threads of this process by the model's size, and log the choice.

    Args:
        model: With all its parameters, those that are not trained included.
        device: Nothing is changed where it is no CPU.
        configured: ``training.threads``. Nothing is changed unless it is 0.
    """
    if configured or device.type != "cpu":
        return
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    threads = threads_for(n_parameters, limit=default_threads())
    torch.set_num_threads(threads)
    logger.info(
        "threads %d of %d, chosen for %s parameters; training.threads sets another number",
        *(threads, default_threads(), f"{n_parameters:,}"),
    )
