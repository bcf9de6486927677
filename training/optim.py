"""Optimisers, the average of weights, and learning rates as pure functions of the step.

No schedule has a state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from configs.errors import ConfigError

if TYPE_CHECKING:
    from configs.schema import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimiser that ``training.optimizer`` names, over the model's parameters.

    All parameters are treated alike, unless the model's class has a method ``parameter_groups()``
    that returns what torch's optimisers take: dicts of ``params`` and their own settings, such as
    ``weight_decay``; ``lr_scale`` multiplies the scheduled learning rate.

    Args:
        model: As built, without the wraps of Accelerate.
        config: Kind, rate and decay.

    Raises:
        ConfigError: the groups do not hold every trained parameter exactly once.
    """
    kinds: dict[str, type[torch.optim.Adam]] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
    }
    kind = kinds[config.optimizer]
    return kind(
        _parameter_groups(model), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    hook = getattr(model, "parameter_groups", None)
    if hook is None:
        return [{"params": list(trained.values())}]
    groups: list[dict[str, Any]] = [
        {**group, "params": [value for value in group["params"] if value.requires_grad]}
        for group in hook()
    ]
    times = [id(value) for group in groups for value in group["params"]]
    for name, value in trained.items():
        if times.count(id(value)) != 1:
            raise ConfigError(
                f"model.class: parameter_groups() of {type(model).__name__} names {name!r} "
                f"{times.count(id(value))} times, want every parameter once"
            )
    return groups


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Make ``lr`` the learning rate of every parameter group, times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def make_average(model: nn.Module, decay: float, *, steps: int) -> AveragedModel:
    """Return torch's exponential moving average of a model's weights; its buffers are copied.

    Args:
        model: Weights of now; on its device.
        decay: Share of the average that a step keeps.
        steps: Steps that are in the average already; before the first it is the model itself.
    """
    average = AveragedModel(
        model,
        multi_avg_fn=get_ema_multi_avg_fn(decay),  # type: ignore[no-untyped-call]
    )
    average.n_averaged.fill_(steps)
    return average.requires_grad_(requires_grad=False)


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
        return config.lr * warm * config.lr_gamma ** (epoch // config.lr_step_epochs)
    if config.schedule == "cosine":
        falling = max(1, config.epochs * steps_per_epoch - config.warmup_steps)
        done = min(1.0, max(0, step - config.warmup_steps) / falling)
        return config.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * warm
