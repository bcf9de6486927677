"""Optimisers, and learning rates as pure functions of the step: no schedule has a state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from configs.schema import TrainingConfig


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: TrainingConfig
) -> torch.optim.Optimizer:
    """Return the optimiser that ``training.optimizer`` names, over all parameters alike."""
    kinds: dict[str, type[torch.optim.Adam]] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
    }
    return kinds[config.optimizer](parameters, lr=config.lr, weight_decay=config.weight_decay)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Make ``lr`` the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def lr_at(step: int, config: TrainingConfig, *, steps_per_epoch: int) -> float:
    """Return the learning rate of an optimiser step.

    Args:
        step: Steps done before this one, from 0.
        config: Peak rate, schedule and warm-up.
        steps_per_epoch: Steps of one epoch.

    Returns:
        Linear warm-up to ``lr`` over ``warmup_steps``, times the schedule: 1 for ``constant``;
        ``gamma`` to the number of whole ``step_epochs`` for ``step``; for ``cosine`` half a wave
        from the end of the warm-up down to 0 after the last step.
    """
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "step":
        epoch = step // steps_per_epoch
        return config.lr * warm * config.gamma ** (epoch // config.step_epochs)
    if config.schedule == "cosine":
        falling = max(1, config.epochs * steps_per_epoch - config.warmup_steps)
        done = min(1.0, max(0, step - config.warmup_steps) / falling)
        return config.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * warm
