"""Optimizers, parameter groups, the average of weights, and learning rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from configs.errors import ConfigError
from configs.schema import TrainingConfig
from training.optim import lr_at, make_average, make_optimizer, set_lr


def config(**keys: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"run_name": "r", "lr": 0.1, "epochs": 4, **keys})


def rates(settings: TrainingConfig, steps: range) -> list[float]:
    return [lr_at(step, settings, steps_per_epoch=10) for step in steps]


def test_a_constant_rate_does_not_change() -> None:
    assert set(rates(config(), range(40))) == {0.1}


def test_warm_up_rises_linearly_to_the_peak() -> None:
    got = rates(config(warmup_steps=4), range(6))
    assert got == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_the_step_schedule_decays_at_epochs() -> None:
    got = rates(config(schedule="step", lr_step_epochs=2, lr_gamma=0.5), range(0, 40, 10))
    assert got == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_cosine_falls_from_the_peak_to_zero() -> None:
    got = rates(config(schedule="cosine"), range(0, 41, 10))
    half = [0.1 * 0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert got == pytest.approx(half)
    assert got[-1] == 0.0


@pytest.mark.parametrize(
    ("name", "cls"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_the_optimizer_is_that_of_torch(name: str, cls: type[torch.optim.Optimizer]) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model, config(optimizer=name, weight_decay=0.3))
    assert type(optimizer) is cls
    set_lr(optimizer, 0.7)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.7, 0.3)]


class Grouped(nn.Module):
    """Model with its own parameter groups."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.body, self.head, self.still = (
            nn.Linear(2, 2, bias=False),
            nn.Linear(2, 2),
            nn.Linear(1, 1),
        )
        self.still.requires_grad_(requires_grad=False)
        self.names = names

    def parameter_groups(self) -> list[dict[str, object]]:
        named = dict(self.named_parameters())
        decayed = [named[name] for name in self.names]
        return [
            {"params": decayed},
            {"params": list(self.head.parameters()), "weight_decay": 0.0, "lr_scale": 0.1},
        ]


def test_a_model_can_define_its_parameter_groups() -> None:
    optimizer = make_optimizer(Grouped("body.weight", "still.weight"), config(weight_decay=0.3))
    set_lr(optimizer, 0.5)
    groups = [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert groups == [(0.5, 0.3, 1), (0.05, 0.0, 2)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "contains 'body.weight' 0 times, want every parameter once"),
        (("body.weight", "head.bias"), "contains 'head.bias' 2 times"),
    ],
)
def test_groups_must_contain_every_trained_parameter_once(
    names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"parameter_groups\(\) of Grouped {message}"):
        make_optimizer(Grouped(*names), config())


def test_the_average_decays_exponentially_and_copies_buffers() -> None:
    model = nn.BatchNorm1d(1)
    average = make_average(model, 0.75, steps=0)
    for value in (1.0, 2.0, 4.0):  # averages 1, then 1 * 0.75 + 2 * 0.25 = 1.25, …
        nn.init.constant_(model.weight, value)
        nn.init.constant_(model.get_buffer("running_mean"), value)
        average.update_parameters(model)
    state = average.module.state_dict()
    assert state["weight"].item() == pytest.approx(1.25 * 0.75 + 4 * 0.25)
    assert state["running_mean"].item() == 4.0
    assert not any(each.requires_grad for each in average.parameters())
