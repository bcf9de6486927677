"""Optimizers, the moving average of weights, and stateless learning rate schedules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from configs.errors import ConfigError
from configs.user_code import raised_at

if TYPE_CHECKING:
    from configs.schema import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer named by ``training.optimizer``, over the model's parameters.

    All parameters share the same settings, unless the model's class has a method
    ``parameter_groups()``. It returns the parameter groups of torch's optimizers: dicts of
    ``params`` and settings such as ``weight_decay``. ``lr_scale`` multiplies the scheduled
    learning rate.

    Args:
        model: The bare model, not wrapped by Accelerate.
        config: Kind of optimizer, learning rate and weight decay.

    Raises:
        ConfigError: ``parameter_groups()`` fails, or its groups do not contain every trained
            parameter exactly once.
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
    try:
        groups: list[dict[str, Any]] = [
            {**group, "params": [value for value in group["params"] if value.requires_grad]}
            for group in hook()
        ]
    except (Exception, SystemExit) as error:
        name = f"{type(model).__module__}:{type(model).__name__}"
        raise ConfigError(
            f"model.class: parameter_groups() of {type(model).__name__} fails: "
            f"{raised_at(error, name)}"
        ) from error
    # By identity: torch compares tensors by value.
    grouped = [id(value) for group in groups for value in group["params"]]
    for name, value in trained.items():
        if grouped.count(id(value)) != 1:
            raise ConfigError(
                f"model.class: parameter_groups() of {type(model).__name__} contains {name!r} "
                f"{grouped.count(id(value))} times, want every parameter once"
            )
    return groups


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group to ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def make_average(model: nn.Module, decay: float, *, steps: int) -> AveragedModel:
    """Return torch's exponential moving average of a model's weights. Buffers are copied.

    Args:
        model: The current weights; the average is on the same device.
        decay: Weight of the previous average in each update.
        steps: Steps already in the average. With 0, the first update copies the model.
    """
    average = AveragedModel(
        model,
        multi_avg_fn=get_ema_multi_avg_fn(decay),  # type: ignore[no-untyped-call]
    )
    average.n_averaged.fill_(steps)
    return average.requires_grad_(requires_grad=False)


def lr_at(step: int, config: TrainingConfig, *, steps_per_epoch: int) -> float:
    """Return the learning rate of an optimizer step.

    Args:
        step: Completed steps, from 0.
        config: Peak learning rate, schedule and warm-up.
        steps_per_epoch: Steps of one epoch.

    Returns:
        Linear warm-up to ``lr`` over ``warmup_steps``, times the schedule: 1 for ``constant``;
        ``lr_gamma`` to the power of completed ``lr_step_epochs`` for ``step``; for ``cosine`` half
        a wave from 1 at the end of the warm-up to 0 after the last step.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "step":
        epoch = step // steps_per_epoch
        return config.lr * warmup * config.lr_gamma ** (epoch // config.lr_step_epochs)
    if config.schedule == "cosine":
        decay_steps = max(1, config.epochs * steps_per_epoch - config.warmup_steps)
        progress = min(1.0, max(0, step - config.warmup_steps) / decay_steps)
        return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * warmup
