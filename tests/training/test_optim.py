"""Learning rates are functions of the step alone."""

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


def test_a_constant_rate_stays() -> None:
    assert set(rates(config(), range(40))) == {0.1}


def test_warm_up_climbs_in_equal_steps_to_the_peak() -> None:
    got = rates(config(warmup_steps=4), range(6))
    assert got == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_the_step_schedule_drops_at_epochs() -> None:
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
def test_the_optimiser_is_torchs_own(name: str, cls: type[torch.optim.Optimizer]) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model, config(optimizer=name, weight_decay=0.3))
    assert type(optimizer) is cls
    set_lr(optimizer, 0.7)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.7, 0.3)]


class Grouped(nn.Module):
    """Says itself how its parameters are to be treated."""

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


def test_a_model_may_say_how_its_parameters_are_treated() -> None:
    optimizer = make_optimizer(Grouped("body.weight", "still.weight"), config(weight_decay=0.3))
    set_lr(optimizer, 0.5)
    groups = [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert groups == [(0.5, 0.3, 1), (0.05, 0.0, 2)]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ((), "names 'body.weight' 0 times"),
        (("body.weight", "head.bias"), "names 'head.bias' 2 times"),
    ],
)
def test_groups_hold_every_trained_parameter_once(names: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=rf"parameter_groups\(\) of Grouped {told}"):
        make_optimizer(Grouped(*names), config())


def test_the_average_keeps_its_share_a_step_and_copies_buffers() -> None:
    model = nn.BatchNorm1d(1)
    average = make_average(model, 0.75, steps=0)
    for value in (1.0, 2.0, 4.0):  # 1, then 1 * 0.75 + 2 * 0.25, …
        nn.init.constant_(model.weight, value)
        nn.init.constant_(model.get_buffer("running_mean"), value)
        average.update_parameters(model)
    state = average.module.state_dict()
    assert state["weight"].item() == pytest.approx(1.25 * 0.75 + 4 * 0.25)
    assert state["running_mean"].item() == 4.0
    assert not any(each.requires_grad for each in average.parameters())
